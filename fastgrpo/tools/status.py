"""`fastgrpo status`: the state of each rank, by its heartbeats, and which rank delays the others.

Runs anywhere that sees the run's folder, without torch. Two machines' clocks may differ: a rank of
another machine is watched until its next heartbeat, and its silence is measured here.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.run.heartbeat import FOLDER, WAIT, Heartbeat, node, read
from fastgrpo.run.output import printable

SILENT_S = 60.0  # heartbeats come every three seconds
WATCH_S = 10.0  # three heartbeats, by which a living rank is heard
UNKNOWN_S = 1800.0  # in a phase that has not ended before
LONGER = 3.0  # times the longest before
MOST = 8  # ranks that the verdict names


def status(run_dir: Path, silent_s: float = SILENT_S) -> bool:
    """Print every rank, those in trouble first, and the verdict.  returns whether all is well

    UserError: the folder has no heartbeats.
    """
    beats = read(run_dir)
    if not beats:
        raise UserError(
            f"{run_dir / FOLDER}: no heartbeats; give the run.dir of a run that has begun training."
        )
    beats = by_this_clock(run_dir, beats, silent_s)
    now = time.time()
    troubles = verdict(beats, now, silent_s)
    print("\n".join(lines(beats, now, silent_s)))
    for trouble in troubles or [fine(beats)]:
        print(trouble)
    return not troubles


def by_this_clock(run_dir: Path, beats: Sequence[Heartbeat], silent_s: float) -> list[Heartbeat]:
    """The heartbeats, with those of other machines timed by this machine's clock.

    Watches until each of them is heard again. One that is not was last heard at the latest of what
    its own clock, its file's and this watch allow; until that is longer ago than `silent_s`, as a
    clock that is ahead may hide, the watch goes on.
    """
    begun, first = time.time(), {beat.rank: beat for beat in beats}
    last = {rank: beat for rank, beat in first.items() if not beat.end and beat.host != node()}
    heard: dict[int, Heartbeat] = {}
    while last.keys() - heard.keys():
        now = time.time()
        unheard = [beat for rank, beat in last.items() if rank not in heard]
        stamps = [min(beat.time, written(run_dir, beat.rank), begun) for beat in unheard]
        if now - begun > WATCH_S and all(now - stamp > silent_s for stamp in stamps):
            heard |= {b.rank: replace(b, time=s) for b, s in zip(unheard, stamps, strict=True)}
            break
        time.sleep(0.2)
        changed = [beat for beat in read(run_dir) if beat.rank in last]
        heard |= {
            beat.rank: replace(beat, time=time.time())
            for beat in changed
            if beat.rank not in heard and beat != last[beat.rank]
        }
    return [heard.get(rank, beat) for rank, beat in first.items()]


def written(run_dir: Path, rank: int) -> float:
    """When a rank's file was last written, by the file system's clock; now where it is gone."""
    try:
        return (run_dir / FOLDER / f"rank-{rank}").stat().st_mtime
    except OSError:
        return time.time()


def age(beat: Heartbeat, now: float) -> float:
    """Seconds since the rank was last heard."""
    return max(0.0, now - beat.time)


def in_phase(beat: Heartbeat, now: float) -> float:
    """Seconds since the rank entered its phase; until its end where it has left the run."""
    return beat.phase_s + (0.0 if beat.end else age(beat, now))


def silent(beat: Heartbeat, now: float, silent_s: float) -> bool:
    """Whether a rank that has not ended was not heard for longer than `silent_s`."""
    return not beat.end and age(beat, now) > silent_s


def stuck(beat: Heartbeat, now: float, silent_s: float) -> bool:
    """Whether the rank is in its phase for much longer than ever before."""
    limit = max(silent_s, LONGER * beat.longest_s) if beat.longest_s else UNKNOWN_S
    return not beat.end and in_phase(beat, now) > limit


def suspicion(
    beat: Heartbeat, now: float, silent_s: float
) -> tuple[bool, bool, bool, int, int, float]:
    """A key that sorts first the rank which probably delays the others.

    Failed, silent, not waiting, behind, long in its phase.
    """
    failed = beat.end not in ("", "done")
    progress = beat.iteration, beat.laps
    return (
        not failed,
        not silent(beat, now, silent_s),
        beat.phase == WAIT,
        *progress,
        -in_phase(beat, now),
    )


def lines(beats: Sequence[Heartbeat], now: float, silent_s: float) -> list[str]:
    """A table with a line per rank."""
    heads = ("rank", "node", "pid", "iteration", "phase", "for", "heard", "where")
    rows: list[tuple[str, ...]] = [heads]
    for beat in sorted(beats, key=lambda beat: suspicion(beat, now, silent_s)):
        heard = beat.end or f"{span(age(beat, now))} ago"
        who = str(beat.rank), beat.host, str(beat.pid)
        what = str(beat.iteration + 1), beat.phase, span(in_phase(beat, now))
        rows.append(tuple(map(printable, (*who, *what, heard, beat.at))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    padded = (
        [cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]]
        for row in rows
    )
    return ["  ".join(row).rstrip() for row in padded]


def verdict(beats: Sequence[Heartbeat], now: float, silent_s: float) -> list[str]:
    """Lines that say what is wrong; empty where all is well."""
    ranked = sorted(beats, key=lambda beat: suspicion(beat, now, silent_s))
    troubles = []
    missing = sorted(
        set(range(max(beats, key=lambda beat: beat.time).ranks)) - {beat.rank for beat in beats}
    )
    if missing:
        troubles.append(
            f"no heartbeat of rank {', '.join(map(str, missing))}: not started yet, or its node is "
            "lost"
        )
    troubles += [
        f"{name(beat)} ended in {where(beat)}: {beat.end}"
        for beat in ranked
        if beat.end not in ("", "done")
    ]
    gone = [beat for beat in ranked if silent(beat, now, silent_s)]
    if len(gone) == len(beats) > 1:
        ages = span(min(age(beat, now) for beat in gone))
        troubles.append(
            f"all {len(beats)} ranks are silent, for {ages} at least: the run was killed, or is "
            "between two attempts"
        )
        gone = []
    troubles += [
        f"{name(beat)} seems dead: silent for {span(age(beat, now))}, last in {where(beat)}; "
        "killed, stopped, or its node is lost"
        for beat in gone[:MOST]
    ]
    troubles += [f"{len(gone) - MOST} more ranks are silent, see above"] * (len(gone) > MOST)
    living = [beat for beat in ranked if not beat.end and not silent(beat, now, silent_s)]
    # who waits for a slow rank is not stuck itself
    busy = [beat for beat in living if beat.phase != WAIT] or living
    if not troubles and any(stuck(beat, now, silent_s) for beat in busy):
        troubles.append(hung(living, now))
    return troubles


def hung(beats: Sequence[Heartbeat], now: float) -> str:
    """The living rank that delays the others, in words.  beats: the most suspicious one first"""
    first, rest = beats[0], beats[1:]
    progress = first.phase, first.iteration, first.laps
    others = [beat for beat in rest if (beat.phase, beat.iteration, beat.laps) != progress]
    for_long = f"for {span(in_phase(first, now))}, longest before {span(first.longest_s)}"
    if rest and not others:
        return (
            f"all {len(beats)} ranks seem hung in {where(first)} ({for_long}): if their `where` is "
            "one collective, its network or a peer is lost; if not, they disagree about what to do"
        )
    elsewhere = f"; the others are in {', '.join(sorted({beat.phase for beat in others}))}"
    return f"{name(first)} seems hung in {where(first)} ({for_long}){elsewhere if others else ''}"


def fine(beats: Sequence[Heartbeat]) -> str:
    """The line for a run in good order."""
    ended = sum(beat.end == "done" for beat in beats)
    if ended == len(beats):
        return f"the run has ended in good order, {ended} rank{'s' * (ended != 1)}"
    if ended:
        return f"{ended} of {len(beats)} ranks have ended"
    return f"all {len(beats)} ranks are alive" if len(beats) > 1 else "the one rank is alive"


def name(beat: Heartbeat) -> str:
    """Rank, node and process, as messages name them."""
    return f"rank {beat.rank} (node {beat.host}, pid {beat.pid})"


def where(beat: Heartbeat) -> str:
    """Phase and iteration, as messages name them."""
    return f"{beat.phase}, iteration {beat.iteration + 1}"


def span(seconds: float) -> str:
    """`0.4 s`, `45 s`, `9 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
