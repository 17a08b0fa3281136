"""Seconds, processor time and peak memory of an iteration's phases on one rank."""

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
    cpu: float = 0.0  # seconds on a core, of all threads; far below other ranks': it waited
    memory: tuple[float, ...] = (0.0, 0.0, 0.0)  # peaks in GiB, as memory.KINDS has them

    def add(self, seconds: float, cpu: float, memory: tuple[float, ...]) -> None:
        """Add one piece of the phase.  memory: its peaks"""
        self.seconds, self.cpu = self.seconds + seconds, self.cpu + cpu
        self.memory = tuple(max(pair) for pair in zip(self.memory, memory, strict=True))


@dataclass(kw_only=True)
class Stopwatch:
    """Divides an iteration of this rank into phases, and notes each in the heartbeat."""

    heart: HeartbeatWriter | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)
    last: float = field(default_factory=time.perf_counter)
    last_cpu: float = field(default_factory=time.process_time)

    def lap(self, phase: str, then: str = BETWEEN) -> None:
        """Add the time since the last lap to a phase; on a GPU, wait for the work queued so far.

        then: the phase that begins now
        """
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # not the scoring's stream
        now, cpu = time.perf_counter(), time.process_time()
        self.phases.setdefault(phase, Phase()).add(
            now - self.last, cpu - self.last_cpu, self.peaks.read()
        )
        self.last, self.last_cpu = now, cpu
        if self.heart is not None:
            self.heart.enter(then)

    def pieces(self, work: Iterable[T], phase: str, then: str) -> Iterator[T]:
        """The pieces of a phase, one by one.

        Asking for the next piece, where ranks agree on it, counts as waiting.
        then: the phase that begins after the last piece
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
