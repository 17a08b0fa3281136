"""Latents to pixels to rewards, overlapped with the rollout of the next batch.

A score that could not be had is NaN and invalid; nothing stands in for it. Invalid samples are left out of their
group's statistics and of the loss, and counted.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.config import Recipe
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

    def __init__(self, sources: Sequence[Source], parts: Sequence[str], fps: float, world: World) -> None:
        self.sources = sources
        self.parts = list(parts)
        self.fps = fps
        self.world = world
        self.threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="scoring")
        self.pending: list[tuple[list[int], Future[Tensor]]] = []

    def submit(self, slots: list[int], pixels: Tensor, prompts: Sequence[str]) -> None:
        """Start scoring a batch.  pixels: uint8 [B, F, H, W, 3] for the B slots"""
        self.pending.append((slots, self.threads.submit(self._score, pixels.cpu(), list(prompts))))

    def _score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """[B, parts] float32, NaN where a score is invalid."""
        columns: dict[str, Tensor] = {}
        for source in self.sources:
            for scores in source.score(pixels, prompts, self.fps).values():
                for part, values in scores.values.items():
                    columns[part] = values.float().masked_fill(~scores.valid, float("nan"))
        missing = [part for part in self.parts if part not in columns]
        if missing:
            raise UserError(
                f"rewards: no reward has a part '{missing[0]}'; the parts are {', '.join(sorted(columns))}."
            )
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
    if inside:
        sources.append(client.ScorerInProcess(inside))
    if outside:
        settings = recipe.server
        if settings.urls:
            assert settings.token_file is not None
            urls, token = settings.urls, read_token(settings.token_file)
        else:
            url, token = world.on_main(lambda: stack.enter_context(server.launch_beside(outside, recipe.run.dir)))
            urls = (url,)
        reward_client = client.RewardClient(
            urls, token, outside, timeout_s=settings.request_timeout_s, outage_s=settings.outage_s
        )
        stack.callback(reward_client.close)
        world.on_main(lambda: reward_client.wait_ready(settings.start_timeout_s))
        sources.append(reward_client)
    return sources


def read_token(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise UserError(
            f"server.token_file={file}: {error.strerror}; write the servers' bearer token into it."
        ) from None
