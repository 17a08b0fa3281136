"""All ranks' phases of an iteration, gathered at its end: who was slow, and a log file per rank.

A rank that waits for a slower one has that time in the phase `wait`, as far as it waits between
pieces of work. Inside the update, and wherever weights or sequences are sharded, ranks keep step
layer by layer: there all take the time of the slowest, and no clock of the host tells them apart.
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

from fastgrpo.core.files import no_link
from fastgrpo.core.memory import KINDS
from fastgrpo.parallel.world import World
from fastgrpo.run.heartbeat import WAIT, HeartbeatWriter, node
from fastgrpo.run.stopwatch import Stopwatch
from fastgrpo.run.terminal import PHASES

MUCH = 1.5  # times the median
AT_LEAST_S = 0.2  # over the median
AT_LEAST_SHARE = 0.05  # of the iteration over the median
TAIL = 16384  # bytes, more than a line has


@dataclass(frozen=True)
class Spread:
    """An iteration's phases on every rank."""

    hosts: Sequence[str]  # by rank
    seconds: dict[str, list[float]]  # phase -> by rank
    memory: dict[str, dict[str, float]]  # kind of KINDS -> phase -> largest peak of a rank, in GiB

    def metrics(self) -> dict[str, float]:
        """Metrics of the iteration, as tracker.py names them.

        Nothing on a kind of memory that was never used, nor on the spread of a single rank.
        """
        metrics: dict[str, float] = {}
        for kind, peaks in self.memory.items():
            metrics |= {
                f"{kind}_gib/{phase}": peak
                for phase, peak in peaks.items()
                if max(peaks.values()) > 0
            }
        if len(self.hosts) == 1:
            return metrics
        for phase, seconds in self.seconds.items():
            metrics |= {f"seconds_min/{phase}": min(seconds), f"seconds_max/{phase}": max(seconds)}
            metrics[f"seconds_median/{phase}"] = statistics.median(seconds)
            if phase != WAIT:
                metrics[f"slowest/{phase}"] = float(slowest(seconds))
        return metrics | {"slowest/rank": float(slowest(self._busy()))}

    def note(self) -> str:
        """`slow: rank 5 (node n1) took 1.9x the median in rollout`; empty where no rank was."""
        notes = []
        total = max(map(sum, zip(*self.seconds.values(), strict=True)), default=0.0)
        for phase, seconds in self.seconds.items():
            middle, rank = statistics.median(seconds), slowest(seconds)
            over = seconds[rank] - middle
            limit = max((MUCH - 1) * middle, AT_LEAST_S, AT_LEAST_SHARE * total)
            if phase != WAIT and over > limit:
                times = f"{over:.1f} s over"
                if middle > 0.01 * seconds[rank]:
                    times = f"{seconds[rank] / middle:.1f}x"
                where = f"rank {rank} (node {self.hosts[rank]})"
                notes.append(f"{where} took {times} the median in {phase}")
        return f"slow: {'; '.join(notes)}" if notes else ""

    def _busy(self) -> list[float]:
        """Seconds in which each rank did not wait, by rank."""
        working = [seconds for phase, seconds in self.seconds.items() if phase != WAIT]
        return [sum(of_rank) for of_rank in zip(*working, strict=True)]


def slowest(seconds: Sequence[float]) -> int:
    """The rank that took longest.  seconds: by rank"""
    return max(range(len(seconds)), key=seconds.__getitem__)


class Ranks:
    """The clocks of all ranks: stopwatches to use, gathered numbers, and the log of this rank."""

    def __init__(self, run_dir: Path, world: World, heart: HeartbeatWriter) -> None:
        """To be called on every rank at once."""
        self.world, self.heart = world, heart
        self.hosts: list[str] = [""] * world.size
        dist.all_gather_object(self.hosts, node())
        device = "cpu"
        if world.device.type == "cuda":
            device = f"{world.device} {torch.cuda.get_device_name()}"
        self.log = RankLog(run_dir, world.rank)
        self.where = {"rank": world.rank, "host": self.hosts[world.rank], "device": device}

    def watch(self, iteration: int) -> Stopwatch:
        """A stopwatch for an iteration that begins now."""
        self.heart.enter("rollout", iteration)
        return Stopwatch(heart=self.heart)

    def gather(self, iteration: int, watch: Stopwatch) -> Spread:
        """Every rank's phases, on every rank, by one all-gather between the hosts.

        Appends this rank's phases to its log.
        """
        self.log.append({"iteration": iteration, "time": time.time(), **self.where, **own(watch)})
        mine = table(watch)
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        return spread(self.hosts, torch.stack(everyone))


def own(watch: Stopwatch) -> dict[str, dict[str, float]]:
    """Phases of one rank as its log has them."""
    phases = watch.phases.items()
    numbers = {
        "seconds": {name: round(phase.seconds, 4) for name, phase in phases},
        "cpu_seconds": {name: round(phase.cpu, 4) for name, phase in phases},
    }
    for n, kind in enumerate(KINDS):
        if any(phase.memory[n] for _, phase in phases):
            numbers[f"{kind}_gib"] = {name: round(phase.memory[n], 4) for name, phase in phases}
    return numbers


def table(watch: Stopwatch) -> Tensor:
    """Numbers of one rank for the others.

    returns float64 [phases, 2 + KINDS]: present (1 or 0), seconds, memory in GiB
    AssertionError: a phase that terminal.PHASES does not name, which is our mistake.
    """
    unknown = watch.phases.keys() - set(PHASES)
    assert not unknown, f"not in terminal.PHASES: {unknown}"
    rows = torch.zeros(len(PHASES), 2 + len(KINDS), dtype=torch.float64)
    for row, name in zip(rows, PHASES, strict=True):
        if name in watch.phases:
            phase = watch.phases[name]
            row[:] = torch.tensor([1.0, phase.seconds, *phase.memory], dtype=torch.float64)
    return rows


def spread(hosts: Sequence[str], tables: Tensor) -> Spread:
    """The numbers of all ranks by phase, without phases that no rank had.

    hosts: by rank;  tables: float64 [ranks, phases, 2 + KINDS], see `table`
    """
    present = [n for n in range(len(PHASES)) if tables[:, n, 0].any()]
    peaks = tables[:, :, 2:].amax(0).tolist()
    return Spread(
        hosts,
        {PHASES[n]: tables[:, n, 1].tolist() for n in present},
        {kind: {PHASES[n]: peaks[n][k] for n in present} for k, kind in enumerate(KINDS)},
    )


class RankLog:
    """The log of one rank, a JSON line per iteration; an OSError is printed once, no more."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.file = run_dir / "logs" / f"rank-{rank}.jsonl"
        self.failed = False

    def append(self, row: Mapping[str, object]) -> None:
        """Append one line."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a+b", opener=no_link) as lines:
                cut_off = lines.tell() > 0 and not _tail(self.file).endswith(b"\n")  # by a kill
                lines.write((b"\n" if cut_off else b"") + json.dumps(row).encode() + b"\n")
        except OSError as error:
            if not self.failed:
                print(
                    f"fastgrpo: {self.file}: {error.strerror}; training goes on without that log",
                    file=sys.stderr,
                )
            self.failed = True


def hosts_of(run_dir: Path) -> dict[int, str]:
    """The node of each rank that has a log, as its last line says."""
    hosts = {}
    for file in (run_dir / "logs").glob("rank-*.jsonl"):
        try:
            row = json.loads(_tail(file).splitlines()[-1])
            hosts[int(row["rank"])] = str(row["host"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # empty, or cut off by a kill
    return hosts


def _tail(file: Path) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, content.seek(0, 2) - TAIL))
        return content.read()
