"""Latents to pixels to rewards, overlapped with the rollout of the next batch.

A score that could not be had is NaN and invalid; nothing stands in for it. Invalid samples are left out of their
group's statistics and of the loss, and counted. A part of weight 0 is a monitor: it is scored and logged, and a sample
without it is as good as any.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import Recipe, RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.memory import to_host
from fastgrpo.core.reward import Scores
from fastgrpo.parallel.world import World
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.server.child import launch_beside

log = logging.getLogger(__name__)

EVENTS = ("requests_failed", "requests_turned_away", "requests_bad", "clips_given_up")
"""What sources count; see rewards/serving/client/client.py."""


class NoScores(UserError):
    """Scores that could not be had end the run, on every rank, between two updates: what was trained can be saved."""


class Source(Protocol):
    """Where scores come from: the trainer's own process or the reward server's client."""

    @property
    def at_once(self) -> int:
        """Batches that it can score at a time, in as many threads."""

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """pixels: uint8 [B, F, H, W, 3].  returns each reward's scores"""

    def release(self) -> None:
        """Give back what is not needed until the next scores are wanted, such as the memory of a shared GPU."""

    def take_events(self) -> dict[str, int]:
        """What went wrong since the last call: counts by the names of EVENTS."""


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
            self.world.agree(error)
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


def open_rewards(recipe: Recipe, world: World, stack: ExitStack) -> list[Source]:
    """Where each reward's scores come from; starts the server beside the trainer where the recipe names none."""
    for spec in recipe.rewards:
        if recipe.video.frames < (least := rewards.least_frames(spec.name)):
            raise UserError(
                f"video.frames={recipe.video.frames}: {spec.name} judges clips of at least {least}; use longer clips, "
                "or another reward."
            )
    inside = [spec for spec in recipe.rewards if spec.where == "process"]
    outside = [spec for spec in recipe.rewards if spec.where == "server"]
    sources: list[Source] = []
    parts: dict[str, Sequence[str]] = {}
    if inside:
        here = world.together(lambda: ScorerInProcess(inside, world.device))
        parts |= {name: one.reward.names for name, one in here.served.items()}
        sources.append(here)
    if outside:
        addresses = world.on_main(lambda: _servers(recipe, outside, world, stack))
        for (urls, token, fps), names in _groups(outside, addresses).items():
            client, told = _connect(recipe, world, urls, token, fps, names, stack)
            parts |= told
            sources.append(client)
    for spec in recipe.rewards:
        unknown = [part for part in spec.weights if part not in parts[spec.name]]
        if unknown:
            raise UserError(
                f"rewards.weights: {spec.name} has no part '{unknown[0]}'; its parts are {', '.join(parts[spec.name])}."
            )
    return sources


Address = tuple[tuple[str, ...], str]  # urls, token


def _groups(
    specs: Sequence[RewardSpec], addresses: dict[str, Address]
) -> dict[tuple[tuple[str, ...], str, float | None], list[str]]:
    """The rewards that one request can ask for: of the same servers and told the same frame rate."""
    groups: dict[tuple[tuple[str, ...], str, float | None], list[str]] = {}
    for spec in specs:
        groups.setdefault((*addresses[spec.name], spec.fps), []).append(spec.name)
    return groups


def _connect(
    recipe: Recipe,
    world: World,
    urls: tuple[str, ...],
    token: str,
    fps: float | None,
    names: list[str],
    stack: ExitStack,
) -> tuple[RewardClient, dict[str, Sequence[str]]]:
    """(a client, the parts of its rewards), once all servers are ready and found to be the same."""
    settings = recipe.server
    client = RewardClient(urls, token, names, settings.request_timeout_s, settings.outage_s, fps)
    stack.callback(client.close)
    spec = world.on_main(lambda: client.wait_ready(settings.start_timeout_s))
    client.expect(spec)
    return client, {name: spec[name]["parts"] for name in names}


def _servers(recipe: Recipe, specs: list[RewardSpec], world: World, stack: ExitStack) -> dict[str, Address]:
    """Where each reward is served; starts one server, for as long as the stack is open, for those that name none."""
    settings = recipe.server
    addresses: dict[str, Address] = {}
    named = {spec.name: spec.urls or settings.urls for spec in specs}
    if any(named.values()):
        if settings.token_file is None:
            raise UserError("server.token_file: missing; running servers (urls) want a token, name its file.")
        token = read_token(settings.token_file)
        addresses |= {name: (urls, token) for name, urls in named.items() if urls}
    beside = [spec for spec in specs if spec.name not in addresses]
    if not beside:
        return addresses
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) < world.size:
        raise UserError(
            "server.urls: none, and the run spans several nodes, which a server beside the first rank cannot serve; "
            "start servers with `fastgrpo serve-rewards` and name them."
        )
    for spec in beside:
        rewards.check(spec.name)
    url, token = stack.enter_context(launch_beside(beside, recipe.run.dir, settings.start_timeout_s))
    return addresses | {spec.name: ((url,), token) for spec in beside}


def read_token(file: Path) -> str:
    """The bearer token in a file. Raises UserError where there is none that a header can carry."""
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise UserError(
            f"server.token_file={file}: {error.strerror}; write the servers' bearer token into it."
        ) from None
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"server.token_file={file}: no usable token in it; write one line of printable characters.")
    return token
