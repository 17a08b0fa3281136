"""What an iteration's phases take of one rank: seconds, processor time and peak memory."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fastgrpo.core.memory import Peaks
from fastgrpo.run.heartbeat import WAIT, HeartbeatWriter

T = TypeVar("T")
BETWEEN = "between iterations"


@dataclass
class Phase:
    """One phase's share of an iteration."""

    seconds: float = 0.0
    cpu: float = 0.0  # seconds of all of this process's threads on a core; far below the others' = it waited
    memory: tuple[float, ...] = (0.0, 0.0, 0.0)  # peaks in GiB, as peaks.KINDS has them

    def add(self, seconds: float, cpu: float, memory: tuple[float, ...]) -> None:
        self.seconds, self.cpu = self.seconds + seconds, self.cpu + cpu
        self.memory = tuple(max(pair) for pair in zip(self.memory, memory, strict=True))


@dataclass
class Stopwatch:
    """Divides an iteration of this rank into phases; tells the heartbeat, where there is one, which has begun."""

    heart: HeartbeatWriter | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)
    last: float = field(default_factory=time.perf_counter)
    last_cpu: float = field(default_factory=time.process_time)

    def lap(self, phase: str, then: str = BETWEEN) -> None:
        """Add what happened since the last lap to a phase; on a GPU, the work queued so far.  then: what begins now"""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # not the scoring's stream, which runs beside it
        now, cpu = time.perf_counter(), time.process_time()
        self.phases.setdefault(phase, Phase()).add(now - self.last, cpu - self.last_cpu, self.peaks.read())
        self.last, self.last_cpu = now, cpu
        if self.heart is not None:
            self.heart.enter(then)

    def pieces(self, work: Iterable[T], phase: str, then: str) -> Iterator[T]:
        """The pieces of a phase, one by one. Asking for the next, where ranks agree on it, counts as waiting.

        then: what begins after the last piece
        """
        pieces, last = iter(work), object()
        while True:
            self.lap(phase, WAIT)
            piece = next(pieces, last)
            self.lap(WAIT, then if piece is last else phase)
            if piece is last:
                return
            yield piece  # type: ignore[misc]

    def metrics(self) -> dict[str, float]:
        """This rank's `seconds/<phase>` and `seconds/total`."""
        seconds = {f"seconds/{name}": phase.seconds for name, phase in self.phases.items()}
        return seconds | {"seconds/total": sum(seconds.values())}
