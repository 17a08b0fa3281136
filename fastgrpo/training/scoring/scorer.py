"""Latents to pixels to rewards, overlapped with the rollout of the next batch.

A missing score is NaN and invalid; no other value takes its place. Invalid samples are left out of
their group's statistics and of the loss, and counted. A part of weight 0 is a monitor: its scores
are logged, and a sample may lack them.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.memory import to_host
from fastgrpo.core.policy import Decoded
from fastgrpo.core.reward import Scores
from fastgrpo.parallel.world import World
from fastgrpo.run.failures import alarms
from fastgrpo.training.scoring.sources import EVENTS, NoScores, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """All ranks' scores, in the order of the slots."""

    values: dict[str, Tensor]  # part -> float32 [N], NaN where that part has no score
    valid: Tensor  # bool [N]: every part that has a weight has a score
    latents_finite: Tensor  # bool [N]; a sample that is not finite has no score
    pixels_finite: Tensor  # bool [N]: what the VAE made of the latents
    seconds: float = 0.0  # spent scoring, mean of the ranks
    waited: float = 0.0  # seconds of these in which the rank did nothing else, mean of the ranks
    events: dict[str, int] = field(default_factory=dict)  # by the names of EVENTS, summed

    @property
    def hidden_share(self) -> float:
        """The share of the scoring time that passed behind rollout and decoding, 0 to 1."""
        return 1.0 - min(self.waited / self.seconds, 1.0) if self.seconds > 0.0 else 1.0

    def weighted_sum(self, weights: dict[str, float]) -> Tensor:
        """Sum of weight x part, for display.  returns float32 [N]"""
        weighted = [weight * self.values[part] for part, weight in weights.items() if weight]
        return torch.stack(weighted).sum(0)

    def metrics(self) -> dict[str, float]:
        """Seconds of scoring, the samples that are not finite, the invalid scores of each part, and
        the events, by metric.
        """
        metrics = {"scoring/seconds": self.seconds, "scoring/hidden_share": self.hidden_share}
        metrics["not_finite/latents"] = float((~self.latents_finite).sum())
        metrics["not_finite/pixels"] = float((self.latents_finite & ~self.pixels_finite).sum())
        for part, values in self.values.items():
            metrics[f"invalid/{part}"] = float(values.isnan().sum())
        return metrics | {f"scoring/{name}": float(count) for name, count in self.events.items()}


def reward_metrics(scored: Scored, weights: dict[str, float], group_size: int) -> dict[str, float]:
    """Means of the valid samples, the spread within groups, and the number of invalid samples."""
    valid = scored.valid
    metrics = {"reward/sum": scored.weighted_sum(weights)[valid].mean().item()}
    for part, values in scored.values.items():
        metrics[f"reward/{part}"] = values[valid].nanmean().item()  # a monitor's may be missing
        spread = values.reshape(-1, group_size).std(1)
        metrics[f"group_std/{part}"] = spread.nanmean().item()
    monitors = [own[valid] for part, own in scored.values.items() if not weights[part]]
    metrics[alarms.MONITORS] = float(sum(own.isnan().sum().item() for own in monitors))
    return metrics | {"reward/invalid": float((~valid).sum())} | scored.metrics()


@dataclass
class Batch:
    """B samples that each source scores on its own."""

    slots: list[int]
    finite: Tensor  # bool [B, 2]: latents and pixels, in host memory once `copied`
    answers: list[Future[dict[str, Scores]]]


class Scorer:
    """Scoring of batches in background threads; `collect` waits for the scores of all ranks."""

    def __init__(
        self,
        sources: Sequence[Source],
        specs: Sequence[RewardSpec],
        fps: float,
        world: World,
    ) -> None:
        self.sources = sources
        self.wanted = {spec.name: list(spec.weights) for spec in specs}
        self.parts = [part for spec in specs for part in spec.weights]
        self.weighed = [column for column, part in enumerate(self.parts) if _weights(specs)[part]]
        self.fps = fps
        self.world = world
        device = (world.device,)
        self.threads = [
            ThreadPoolExecutor(
                source.at_once,
                thread_name_prefix="scoring",
                initializer=_take_device,
                initargs=device,
            )
            for source in self.sources
        ]
        self.pending: list[Batch] = []
        self.spans: list[tuple[float, float]] = []  # (start, end) of scoring, by perf_counter
        self._lock = threading.Lock()

    @property
    def arriving(self) -> int:
        """Bytes of weights that scoring will bring to this rank's GPU."""
        return sum(source.arriving for source in self.sources)

    @property
    def hint(self) -> str:
        """Why clips have no score, as far as this rank knows, or where that is told."""
        return "; ".join(source.hint for source in self.sources)

    def submit(
        self,
        slots: list[int],
        latents: Tensor,
        decoded: Decoded,
        prompts: Sequence[str],
    ) -> None:
        """Start scoring a batch of B slots. A clip whose latents or pixels are not finite gets no
        score.

        latents: [B, C, F, H, W], of which `decoded` was made
        """
        finite = torch.stack([torch.isfinite(latents).flatten(1).all(1), decoded.finite], 1)
        clips, finite = to_host(decoded.pixels), to_host(finite)
        copied = _mark(decoded.pixels)
        answers = []
        for source, threads in zip(self.sources, self.threads, strict=True):
            score = partial(self._score, source, clips, prompts=list(prompts), copied=copied)
            answers.append(threads.submit(score))
        self.pending.append(Batch(slots, finite, answers))

    def _score(
        self, source: Source, pixels: Tensor, prompts: list[str], copied: torch.cuda.Event | None
    ) -> dict[str, Scores]:
        """One source's scores by reward, timed.

        pixels: uint8 [B, F, H, W, 3] in host memory;  copied: the moment at which they are there
        """
        if copied is not None:
            copied.synchronize()
        start = time.perf_counter()
        try:
            return source.score(pixels, prompts, self.fps)
        finally:
            with self._lock:
                self.spans.append((start, time.perf_counter()))

    def collect(self, total: int, when_own: Callable[[], None] = lambda: None) -> Scored:
        """Wait for this rank's batches and gather all ranks' scores.

        when_own: called once this rank's own scores are complete
        Raises a rank's UserError on every rank.
        """
        start = time.perf_counter()
        error, rows = self._wait()
        waited = time.perf_counter() - start
        when_own()
        try:
            self.world.raise_if_any_failed(error)
        except UserError as failure:
            raise NoScores(str(failure)) from None
        positions = [slot for batch in self.pending for slot in batch.slots]
        self.pending.clear()
        self.release()
        everything = self.world.combine(rows, positions, total)
        seconds, waited, events = self._account(waited)
        latents_finite, pixels_finite = (everything[:, -2:] > 0).unbind(1)
        return Scored(
            values={part: everything[:, column] for column, part in enumerate(self.parts)},
            valid=torch.isfinite(everything[:, self.weighed]).all(1),
            latents_finite=latents_finite,
            pixels_finite=pixels_finite,
            seconds=seconds,
            waited=waited,
            events=events,
        )

    def _wait(self) -> tuple[UserError | None, Tensor]:
        """(the error that ends the run; float32 [own samples, parts + 2]).

        The scores are NaN where invalid. The last columns are 1 where latents and pixels are finite.
        """
        error, tables = None, [torch.empty(0, len(self.parts) + 2)]
        for batch in self.pending:
            table = torch.full((len(batch.slots), len(self.parts)), float("nan"))
            for answer in batch.answers:
                try:
                    self._fill(table, answer.result())
                except CancelledError:  # after a failure
                    continue
                except UserError as mistake:
                    error = mistake
                except Exception as failure:  # our bug; other ranks must not wait for ever
                    log.exception("scoring failed")
                    kind = type(failure).__name__
                    error = error or UserError(
                        f"rewards: scoring raised {kind}; see the log above."
                    )
                if error is not None:
                    self.close()
            table = table.masked_fill(~batch.finite.all(1, keepdim=True), float("nan"))
            tables.append(torch.cat([table, batch.finite.float()], 1))
        return error, torch.cat(tables)

    def _fill(self, table: Tensor, answer: dict[str, Scores]) -> None:
        """Put one source's scores into their columns.  table: float32 [B, parts], in place"""
        for name, scores in answer.items():
            for part in self.wanted[name]:
                values = scores.values[part].float().masked_fill(~scores.valid, float("nan"))
                table[:, self.parts.index(part)] = values

    def _account(self, waited: float) -> tuple[float, float, dict[str, int]]:
        """(seconds of scoring, seconds waited, events): means of the ranks, and sums of events."""
        with self._lock:
            spans, self.spans = self.spans, []
        taken = [source.take_events() for source in self.sources]
        counts = [float(sum(events.get(name, 0) for events in taken)) for name in EVENTS]
        row = torch.tensor([[union_length(spans), waited, *counts]], dtype=torch.float32)
        rows = self.world.combine(row, [self.world.rank], self.world.size)
        seconds, waited = rows[:, :2].mean(0).tolist()
        events = {name: int(n) for name, n in zip(EVENTS, rows[:, 2:].sum(0), strict=True)}
        return seconds, waited, events

    def release(self) -> None:
        """Give back what only scoring needs, until the next scores are wanted."""
        for source in self.sources:
            source.release()

    def close(self) -> None:
        """End the threads; what they have not begun is not scored."""
        for threads in self.threads:
            threads.shutdown(wait=False, cancel_futures=True)


def _weights(specs: Sequence[RewardSpec]) -> dict[str, float]:
    return {part: weight for spec in specs for part, weight in spec.weights.items()}


def _take_device(device: torch.device) -> None:
    """Begin a thread on this rank's GPU; otherwise even waiting makes a context on the first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    """The moment at which the work queued so far on the tensor's GPU is done.

    tensor: [...];  returns None for a tensor in host memory
    """
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def union_length(spans: Sequence[tuple[float, float]]) -> float:
    """The seconds in which at least one of the spans lasted."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
