"""Latents to pixels to rewards, overlapped with the rollout of the next batch.

A score that could not be had is NaN and invalid; nothing stands in for it. Invalid samples are left out of their
group's statistics and of the loss, and counted.
"""

import os
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.config import Recipe, RewardSpec
from fastgrpo.distributed import World
from fastgrpo.errors import UserError
from fastgrpo.rewards import Scores, client, server


class Source(Protocol):
    """Where scores come from: the trainer's own process or the reward server's client."""

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """pixels: uint8 [B, F, H, W, 3].  returns each reward's scores"""


@dataclass(frozen=True)
class Scored:
    """All ranks' scores, in the order of the slots."""

    values: dict[str, Tensor]  # part -> float32 [N], NaN where invalid
    valid: Tensor  # bool [N]: every part has a score

    def weighted_sum(self, weights: dict[str, float]) -> Tensor:
        """Sum of weight x part, for display.  returns float32 [N]"""
        return torch.stack([weight * self.values[part] for part, weight in weights.items()]).sum(0)


class Scorer:
    """Scores batches in background threads; `collect` waits for all and puts the ranks' results together."""

    def __init__(self, sources: Sequence[Source], specs: Sequence[RewardSpec], fps: float, world: World) -> None:
        self.sources = sources
        self.wanted = {spec.name: list(spec.weights) for spec in specs}
        self.parts = [part for spec in specs for part in spec.weights]
        self.fps = fps
        self.world = world
        self.threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="scoring")
        self.pending: list[tuple[list[int], Future[Tensor]]] = []

    def submit(self, slots: list[int], latents: Tensor, pixels: Tensor, prompts: Sequence[str]) -> None:
        """Start scoring a batch; a clip whose latents are not finite has no score, whatever its pixels look like.

        latents: [B, C, F, H, W] and their pixels, uint8 [B, F, H, W, 3], for the B slots
        """
        finite = torch.isfinite(latents).flatten(1).all(1).cpu()
        self.pending.append((slots, self.threads.submit(self._score, finite, pixels.cpu(), list(prompts))))

    def _score(self, finite: Tensor, pixels: Tensor, prompts: list[str]) -> Tensor:
        """[B, parts] float32, NaN where a score is invalid."""
        columns: dict[str, Tensor] = {}
        for source in self.sources:
            for name, scores in source.score(pixels, prompts, self.fps).items():
                for part in self.wanted[name]:
                    columns[part] = scores.values[part].float().masked_fill(~(scores.valid & finite), float("nan"))
        return torch.stack([columns[part] for part in self.parts], 1)

    def collect(self, total: int) -> Scored:
        """Wait for this rank's batches and gather the ranks'. Raises a rank's UserError on every rank."""
        positions = self.world.share(total)
        rows = torch.full((len(positions), len(self.parts)), float("nan"))
        error = None
        for slots, future in self.pending:
            try:
                rows[[slot - positions.start for slot in slots]] = future.result()
            except UserError as failure:
                error = failure
                self.threads.shutdown(wait=False, cancel_futures=True)
            except CancelledError:  # after such a failure
                pass
        self.pending.clear()
        self.world.agree(error)
        everything = self.world.combine(rows, positions, total)
        values = {part: everything[:, column] for column, part in enumerate(self.parts)}
        return Scored(values, torch.isfinite(everything).all(1))

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def open_rewards(recipe: Recipe, world: World, stack: ExitStack) -> list[Source]:
    """Where each reward's scores come from; starts the server beside the trainer where the recipe names none."""
    inside = [spec.name for spec in recipe.rewards if spec.where == "process"]
    outside = [spec.name for spec in recipe.rewards if spec.where == "server"]
    sources: list[Source] = []
    parts: dict[str, Sequence[str]] = {}
    if inside:
        parts |= {name: rewards.load(name).names for name in inside}
        sources.append(client.ScorerInProcess(inside))
    if outside:
        settings = recipe.server
        urls, token = world.on_main(lambda: _servers(recipe, outside, world, stack))
        reward_client = client.RewardClient(
            urls, token, outside, timeout_s=settings.request_timeout_s, outage_s=settings.outage_s
        )
        stack.callback(reward_client.close)
        parts |= world.on_main(lambda: reward_client.wait_ready(settings.start_timeout_s))
        sources.append(reward_client)
    for spec in recipe.rewards:
        unknown = [part for part in spec.weights if part not in parts[spec.name]]
        if unknown:
            raise UserError(
                f"rewards.weights: {spec.name} has no part '{unknown[0]}'; its parts are {', '.join(parts[spec.name])}."
            )
    return sources


def _servers(recipe: Recipe, names: list[str], world: World, stack: ExitStack) -> tuple[tuple[str, ...], str]:
    """(urls, token) of the recipe's servers, or of one that is started here for as long as the stack is open."""
    settings = recipe.server
    if settings.urls:
        assert settings.token_file is not None
        return settings.urls, read_token(settings.token_file)
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) < world.size:
        raise UserError(
            "server.urls: none, and the run spans several nodes, which a server beside the first rank cannot serve; "
            "start servers with `fastgrpo serve-rewards` and name them."
        )
    for name in names:
        rewards.check(name)
    url, token = stack.enter_context(server.launch_beside(names, recipe.run.dir, settings.start_timeout_s))
    return (url,), token


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
