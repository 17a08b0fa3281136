"""Latents to pixels to rewards, overlapped with the rollout of the next batch.

A score that could not be had is NaN and invalid; nothing stands in for it. Invalid samples are left out of their
group's statistics and of the loss, and counted. A part of weight 0 is a monitor: it is scored and logged, and a sample
without it is as good as any.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.memory import to_host
from fastgrpo.core.reward import Scores
from fastgrpo.parallel.world import World
from fastgrpo.training.scoring.sources import EVENTS, NoScores, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """All ranks' scores, in the order of the slots."""

    values: dict[str, Tensor]  # part -> float32 [N], NaN where invalid
    valid: Tensor  # bool [N]: every part that has a weight has a score
    seconds: float = 0.0  # in which something was being scored, mean of the ranks
    waited: float = 0.0  # of these, seconds in which nothing else was done, mean of the ranks
    events: dict[str, int] = field(default_factory=dict)  # what went wrong on the way, sums of the ranks

    @property
    def hidden_share(self) -> float:
        """How much of the scoring time passed behind rollout and decoding, 0 to 1."""
        return 1.0 - min(self.waited / self.seconds, 1.0) if self.seconds > 0.0 else 1.0

    def weighted_sum(self, weights: dict[str, float]) -> Tensor:
        """Sum of weight x part, for display.  returns float32 [N]"""
        return torch.stack([weight * self.values[part] for part, weight in weights.items() if weight]).sum(0)

    def metrics(self) -> dict[str, float]:
        """The time that scoring took, and how many samples of each part, and requests, went wrong."""
        invalid = {f"invalid/{part}": float(values.isnan().sum()) for part, values in self.values.items()}
        timing = {"scoring/seconds": self.seconds, "scoring/hidden_share": self.hidden_share}
        return timing | invalid | {f"scoring/{name}": float(count) for name, count in self.events.items()}


@dataclass
class Batch:
    """Samples that are being scored, by each source on its own."""

    slots: list[int]
    finite: Tensor  # bool [B], in host memory once `copied`
    answers: list[Future[dict[str, Scores]]]


class Scorer:
    """Scores batches in background threads; `collect` waits for all and puts the ranks' results together."""

    def __init__(self, sources: Sequence[Source], specs: Sequence[RewardSpec], fps: float, world: World) -> None:
        self.sources = sources
        self.wanted = {spec.name: list(spec.weights) for spec in specs}
        self.parts = [part for spec in specs for part in spec.weights]
        self.weighed = [column for column, part in enumerate(self.parts) if _weights(specs)[part]]
        self.fps = fps
        self.world = world
        self.threads = [
            ThreadPoolExecutor(source.at_once, "scoring", _take_device, (world.device,)) for source in sources
        ]
        self.pending: list[Batch] = []
        self.spans: list[tuple[float, float]] = []  # when scores were being made, of time.perf_counter
        self._lock = threading.Lock()

    def submit(self, slots: list[int], latents: Tensor, pixels: Tensor, prompts: Sequence[str]) -> None:
        """Start scoring a batch; a clip whose latents are not finite has no score, whatever its pixels look like.

        latents: [B, C, F, H, W] and their pixels, uint8 [B, F, H, W, 3], for the B slots
        """
        clips, finite = to_host(pixels), to_host(torch.isfinite(latents).flatten(1).all(1))
        copied = _mark(pixels)
        answers = [
            threads.submit(self._score, source, clips, list(prompts), copied)
            for source, threads in zip(self.sources, self.threads, strict=True)
        ]
        self.pending.append(Batch(slots, finite, answers))

    def _score(
        self, source: Source, pixels: Tensor, prompts: list[str], copied: torch.cuda.Event | None
    ) -> dict[str, Scores]:
        if copied is not None:
            copied.synchronize()
        start = time.perf_counter()
        try:
            return source.score(pixels, prompts, self.fps)
        finally:
            with self._lock:
                self.spans.append((start, time.perf_counter()))

    def collect(self, total: int, here: Callable[[], None] = lambda: None) -> Scored:
        """Wait for this rank's batches and gather the ranks'. Raises a rank's UserError on every rank.

        here: called once this rank's own scores are there
        """
        start = time.perf_counter()
        error, rows = self._wait()
        waited = time.perf_counter() - start
        here()
        try:
            self.world.raise_if_any_failed(error)
        except UserError as failure:
            raise NoScores(str(failure)) from None
        positions = [slot for batch in self.pending for slot in batch.slots]
        self.pending.clear()
        for source in self.sources:
            source.release()
        everything = self.world.combine(rows, positions, total)
        seconds, waited, events = self._account(waited)
        values = {part: everything[:, column] for column, part in enumerate(self.parts)}
        valid = torch.isfinite(everything[:, self.weighed]).all(1)
        return Scored(values, valid, seconds, waited, events)

    def _wait(self) -> tuple[UserError | None, Tensor]:
        """(what ends the run, float32 [this rank's samples, parts] with NaN where a score is invalid)."""
        error, tables = None, [torch.empty(0, len(self.parts))]
        for batch in self.pending:
            table = torch.full((len(batch.slots), len(self.parts)), float("nan"))
            for answer in batch.answers:
                try:
                    self._fill(table, answer.result())
                except CancelledError:  # after a failure
                    continue
                except UserError as mistake:
                    error = mistake
                except Exception as failure:  # a bug of ours; the other ranks must not wait for this one for ever
                    log.exception("scoring failed")
                    error = error or UserError(f"rewards: scoring raised {type(failure).__name__}; see the log above.")
                if error is not None:
                    self.close()
            tables.append(table.masked_fill(~batch.finite[:, None], float("nan")))
        return error, torch.cat(tables)

    def _fill(self, table: Tensor, answer: dict[str, Scores]) -> None:
        """Put one source's scores into their columns."""
        for name, scores in answer.items():
            for part in self.wanted[name]:
                table[:, self.parts.index(part)] = scores.values[part].float().masked_fill(~scores.valid, float("nan"))

    def _account(self, waited: float) -> tuple[float, float, dict[str, int]]:
        """(seconds of scoring, seconds waited for it: means of the ranks; events: sums of the ranks)."""
        with self._lock:
            spans, self.spans = self.spans, []
        taken = [source.take_events() for source in self.sources]
        counts = [float(sum(events.get(name, 0) for events in taken)) for name in EVENTS]
        row = torch.tensor([[union_length(spans), waited, *counts]], dtype=torch.float32)
        rows = self.world.combine(row, [self.world.rank], self.world.size)
        seconds, waited = rows[:, :2].mean(0).tolist()
        return seconds, waited, {name: int(count) for name, count in zip(EVENTS, rows[:, 2:].sum(0), strict=True)}

    def close(self) -> None:
        for threads in self.threads:
            threads.shutdown(wait=False, cancel_futures=True)


def _weights(specs: Sequence[RewardSpec]) -> dict[str, float]:
    return {part: weight for spec in specs for part, weight in spec.weights.items()}


def _take_device(device: torch.device) -> None:
    """Begin a thread on this rank's GPU: on the first one, where a thread begins, even waiting makes a context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    """The moment at which what was queued so far on the tensor's GPU is done."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def union_length(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the spans lasted."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
