"""All ranks' phases of an iteration: gathered once, at its end; who was slow, and a log file per rank.

A rank that waits for a slower one has that time in the phase `wait`, as far as it waits between pieces of work. Inside
the update, and wherever weights or sequences are sharded, ranks keep step layer by layer: there all take the time of
the slowest, and no clock of the host tells them apart.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.core.memory import KINDS
from fastgrpo.parallel.world import World
from fastgrpo.run.heartbeat import WAIT, HeartbeatWriter, node
from fastgrpo.run.stopwatch import Stopwatch
from fastgrpo.run.terminal import PHASES

MUCH = 1.5  # times the median


AT_LEAST_S = 0.2  # over the median


AT_LEAST_SHARE = 0.05  # of the iteration over the median


@dataclass(frozen=True)
class Spread:
    """An iteration's phases on every rank."""

    hosts: Sequence[str]  # by rank
    seconds: dict[str, list[float]]  # phase -> by rank
    memory: dict[str, dict[str, float]]  # of KINDS -> phase -> peak in GiB, the largest of the ranks

    def metrics(self) -> dict[str, float]:
        """`seconds_min/`, `_median/`, `_max/<phase>`, `slowest/<phase>` and `/rank`: a rank; `<kind>_gib/<phase>`.

        Nothing on a kind of memory that was never used, nor on the spread of a single rank.
        """
        found: dict[str, float] = {}
        for kind, peaks in self.memory.items():
            found |= {f"{kind}_gib/{phase}": peak for phase, peak in peaks.items() if max(peaks.values()) > 0}
        if len(self.hosts) == 1:
            return found
        for phase, seconds in self.seconds.items():
            found |= {f"seconds_min/{phase}": min(seconds), f"seconds_max/{phase}": max(seconds)}
            found[f"seconds_median/{phase}"] = statistics.median(seconds)
            if phase != WAIT:
                found[f"slowest/{phase}"] = float(slowest(seconds))
        return found | {"slowest/rank": float(slowest(self._busy()))}

    def note(self) -> str:
        """`slow: rank 5 (node n1) took 1.9x the median in rollout`, for each phase of which that is true; or empty."""
        notes = []
        total = max(map(sum, zip(*self.seconds.values(), strict=True)), default=0.0)
        for phase, seconds in self.seconds.items():
            middle, rank = statistics.median(seconds), slowest(seconds)
            over = seconds[rank] - middle
            if phase != WAIT and over > max((MUCH - 1) * middle, AT_LEAST_S, AT_LEAST_SHARE * total):
                times = f"{seconds[rank] / middle:.1f}x" if middle > 0.01 * seconds[rank] else f"{over:.1f} s over"
                notes.append(f"rank {rank} (node {self.hosts[rank]}) took {times} the median in {phase}")
        return f"slow: {'; '.join(notes)}" if notes else ""

    def _busy(self) -> list[float]:
        """Seconds of each rank that it did not wait."""
        working = [seconds for phase, seconds in self.seconds.items() if phase != WAIT]
        return [sum(of_rank) for of_rank in zip(*working, strict=True)]


def slowest(seconds: Sequence[float]) -> int:
    """The rank that took longest."""
    return max(range(len(seconds)), key=seconds.__getitem__)


class Ranks:
    """One per rank: hands out stopwatches, gathers them, and appends to the rank's own log."""

    def __init__(self, run_dir: Path, world: World, heart: HeartbeatWriter) -> None:
        """On every rank at once."""
        self.world, self.heart = world, heart
        self.hosts: list[str] = [""] * world.size
        dist.all_gather_object(self.hosts, node())
        device = f"{world.device} {torch.cuda.get_device_name()}" if world.device.type == "cuda" else "cpu"
        self.log = RankLog(run_dir, world.rank)
        self.where = {"rank": world.rank, "host": self.hosts[world.rank], "device": device}

    def watch(self, iteration: int) -> Stopwatch:
        """A stopwatch for an iteration that begins now."""
        self.heart.enter("rollout", iteration)
        return Stopwatch(self.heart)

    def gather(self, iteration: int, watch: Stopwatch) -> Spread:
        """Every rank's phases, on every rank: one all-gather of some numbers between the hosts. Appends to the log."""
        self.log.append({"iteration": iteration, "time": time.time(), **self.where, **own(watch)})
        mine = table(watch)
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        return spread(self.hosts, torch.stack(everyone))


def own(watch: Stopwatch) -> dict[str, dict[str, float]]:
    """One rank's phases as its log has them."""
    phases = watch.phases.items()
    found = {
        "seconds": {name: round(phase.seconds, 4) for name, phase in phases},
        "cpu_seconds": {name: round(phase.cpu, 4) for name, phase in phases},
    }
    for place, kind in enumerate(KINDS):
        if any(phase.memory[place] for _, phase in phases):
            found[f"{kind}_gib"] = {name: round(phase.memory[place], 4) for name, phase in phases}
    return found


def table(watch: Stopwatch) -> Tensor:
    """One rank's numbers for the others.  returns float64 [phases, 2 + KINDS]: present, seconds, memory

    AssertionError: a phase that display.PHASES does not name, which is our mistake.
    """
    unknown = watch.phases.keys() - set(PHASES)
    assert not unknown, f"not in display.PHASES: {unknown}"
    rows = torch.zeros(len(PHASES), 2 + len(KINDS), dtype=torch.float64)
    for row, name in zip(rows, PHASES, strict=True):
        if name in watch.phases:
            phase = watch.phases[name]
            row[:] = torch.tensor([1.0, phase.seconds, *phase.memory], dtype=torch.float64)
    return rows


def spread(hosts: Sequence[str], tables: Tensor) -> Spread:
    """tables: [ranks, phases, 2 + KINDS], see `table`.  A phase that no rank had is left out."""
    present = [n for n in range(len(PHASES)) if tables[:, n, 0].any()]
    peaks = tables[:, :, 2:].amax(0).tolist()
    return Spread(
        hosts,
        {PHASES[n]: tables[:, n, 1].tolist() for n in present},
        {kind: {PHASES[n]: peaks[n][place] for n in present} for place, kind in enumerate(KINDS)},
    )


TAIL = 16384  # bytes, more than a line has


class RankLog:
    """What one rank appends to, once per iteration; an OSError ends nothing and is told once, on stderr."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.file = run_dir / "logs" / f"rank-{rank}.jsonl"
        self.failed = False

    def append(self, row: Mapping[str, object]) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as lines:
                begun = lines.tell() > 0 and not _tail(self.file).endswith(b"\n")  # cut off by a kill
                lines.write((b"\n" if begun else b"") + json.dumps(row).encode() + b"\n")
        except OSError as error:
            if not self.failed:
                print(f"fastgrpo: {self.file}: {error.strerror}; training goes on without that log", file=sys.stderr)
            self.failed = True


def hosts_of(run_dir: Path) -> dict[int, str]:
    """The node of each rank that has a log, as its last line says."""
    found = {}
    for file in (run_dir / "logs").glob("rank-*.jsonl"):
        try:
            row = json.loads(_tail(file).splitlines()[-1])
            found[int(row["rank"])] = str(row["host"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # empty, or cut off by a kill
    return found


def _tail(file: Path) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, content.seek(0, 2) - TAIL))
        return content.read()
