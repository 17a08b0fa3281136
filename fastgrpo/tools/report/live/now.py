"""Where a run is now: iteration, time left, each rank's trouble, the slowest rank, GPU memory."""

import time
from collections.abc import Sequence
from html import escape

from fastgrpo.run import heartbeat
from fastgrpo.run.heartbeat import Heartbeat
from fastgrpo.run.terminal import PHASES, duration, seconds_left
from fastgrpo.tools.report.clips import when
from fastgrpo.tools.report.run_data import Run
from fastgrpo.tools.status import SILENT_S, fine, in_phase, suspicion, verdict


def now(run: Run) -> str:
    """The section on the present state, from the heartbeats and the last iteration's numbers."""
    beats, seconds = heartbeat.read(run.folder), time.time()
    items = "".join(
        f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>"
        for value, label in tiles(run, beats, seconds)
    )
    return (
        f'<section aria-live="off"><h2>Now</h2>{progress_bar(run)}{state(beats, seconds)}'
        f'<ul class="tiles">{items}</ul></section>'
    )


def tiles(run: Run, beats: Sequence[Heartbeat], seconds: float) -> list[tuple[str, str]]:
    """(value, what it is) of each number.  seconds: the time, in Unix seconds"""
    rows = [row for row in run.rows if "seconds/total" in row]
    done, total = len(run.rows), run.total
    found = []
    alive = any(not beat.end and seconds - beat.time <= SILENT_S for beat in beats)
    if total and rows and done < total and alive:
        found.append((duration(seconds_left(rows, total)), "left, at the pace of the last ten"))
    if beats and not ended(beats):
        first = min(beats, key=lambda beat: suspicion(beat, seconds, SILENT_S))
        spent = f"for {duration(in_phase(first, seconds))}" if alive else "when last heard"
        of = f" of {total}" if total else ""
        found.append((first.phase, f"{spent}, iteration {first.iteration + 1}{of}"))
    if rows:
        found += slowest(run) + gpu_memory(run)
    if run.evaluations:
        newest = run.evaluations[-1]
        found.append((when(newest), f"newest of the clips below, {len(newest.prompts)} scored"))
    return found


def ended(beats: Sequence[Heartbeat]) -> bool:
    """Whether every rank has left the run."""
    return bool(beats) and all(beat.end for beat in beats)


def slowest(run: Run) -> list[tuple[str, str]]:
    """The rank that took longest in the last iteration; empty for a run of one rank."""
    row = run.rows[-1]
    if "slowest/rank" not in row:
        return []
    rank = int(row["slowest/rank"])
    host = f" on {run.hosts[rank]}" if rank in run.hosts else ""
    over = {
        phase: row[f"seconds_max/{phase}"] - row[f"seconds_median/{phase}"]
        for phase in PHASES
        if phase != "wait" and f"seconds_max/{phase}" in row and f"seconds_median/{phase}" in row
    }
    where = max(over, key=lambda phase: over[phase], default="")
    behind = f", up to {over[where]:.1f} s over the median in {where}" if where else ""
    return [(f"rank {rank}", f"slowest in the last iteration{host}{behind}")]


def gpu_memory(run: Run) -> list[tuple[str, str]]:
    """The peaks of GPU memory in the last iteration, or of host memory without a GPU."""
    row = run.rows[-1]
    peaks = {
        kind: max(own)
        for kind in ("reserved", "allocated", "resident")
        if (own := [row[f"{kind}_gib/{p}"] for p in PHASES if f"{kind}_gib/{p}" in row])
    }
    if "reserved" in peaks:
        tensors = f", {peaks['allocated']:.2f} GiB of it tensors" if "allocated" in peaks else ""
        return [(f"{peaks['reserved']:.2f} GiB", f"of GPU memory, largest of any rank{tensors}")]
    if "resident" in peaks:
        return [(f"{peaks['resident']:.2f} GiB", "of host memory, largest of any rank")]
    return []


def progress_bar(run: Run) -> str:
    """A bar of the iterations done; empty where the recipe does not say how many there are."""
    if not run.total:
        return ""
    return (
        f'<progress max="{run.total}" value="{len(run.rows)}" aria-label="Iterations done">'
        "</progress>"
    )


def state(beats: Sequence[Heartbeat], seconds: float) -> str:
    """What `fastgrpo status` would say, as banners, or one line where all is well."""
    if not beats:
        return '<p class="note">No rank has been heard yet.</p>'
    troubles = verdict(beats, seconds, SILENT_S)
    if not troubles:
        return f'<p class="note">{escape(sentence(fine(beats)))}</p>'
    return "".join(f'<p class="banner">{escape(sentence(line))}</p>' for line in troubles)


def sentence(line: str) -> str:
    """A line of `fastgrpo status` as a sentence."""
    return f"{line[:1].upper()}{line[1:]}" + ("" if line.endswith(".") else ".")
