"""The ways of working that benchmarks.speed.iteration sets against each other, ready to run
iteration by iteration.
"""

import io
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.speed.meters import held_bytes
from benchmarks.speed.public_way import Public, Sample
from fastgrpo import train
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.parallel.world import World
from fastgrpo.run.tracker import read_metrics
from fastgrpo.session import Session, TrainingSet, claim
from fastgrpo.session import open_session as open_ours
from fastgrpo.training.rollout import Dealing, Plan
from fastgrpo.training.scoring.drawing import Rollouts
from fastgrpo.training.scoring.scorer import Scored

draw = Rollouts.draw
PHASES = ("rollout", "decode", "reward", "update")
PLAIN = (
    "rollout.batch_size=1",
    "optimizer.batch_size=1",
    "model.decode_batch=1",
    "distributed.rollout_weights=sharded",
)
"""Overrides that turn savings off; the rest is in `plain` and `Apart`."""


class Way(Protocol):
    """One way of working: runs iterations one after the other."""

    network: nn.Module
    kept: int
    """Bytes of trajectories that the last iteration kept for its update, on this rank."""

    def iterate(self) -> dict[str, float]:
        """One iteration.  returns seconds by phase, and in total by the clock"""

    def rewards(self) -> Tensor:
        """float32 [samples, weighted parts] of the last rollout, all ranks'."""


class Ours:
    """Our trainer."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.network = session.policy.network
        self.kept = 0
        self.scored: Scored | None = None
        self.collect = session.scorer.collect
        session.scorer.collect = self._collect  # type: ignore[method-assign]

    def _draw(self, rollouts: Rollouts, dealing: Dealing) -> Any:
        drawn = draw(rollouts, dealing)
        self.kept = held_bytes([part for part in drawn if not isinstance(part, Scored)])
        return drawn

    def _collect(self, *arguments: Any, **named: Any) -> Scored:
        self.scored = self.collect(*arguments, **named)
        return self.scored

    def iterate(self) -> dict[str, float]:
        start = time.perf_counter()

        def noted(rollouts: Rollouts, dealing: Dealing) -> Any:
            return self._draw(rollouts, dealing)

        with redirect_stdout(io.StringIO()), mock.patch.object(Rollouts, "draw", noted):
            train.iterate(self.session)
        total = time.perf_counter() - start
        file = self.session.recipe.run.dir / "metrics.jsonl"
        row = self.session.world.on_main(lambda: read_metrics(file)[-1])
        return {phase: row.get(f"seconds/{phase}", 0.0) for phase in PHASES} | {"total": total}

    def rewards(self) -> Tensor:
        assert self.scored is not None
        return torch.stack([self.scored.values[part] for part in self.session.recipe.weights], 1)


class Apart(Plan):
    """A plan whose samples begin alike and are computed one by one: nothing is known to be
    equal.
    """

    @classmethod
    def of(cls, plan: Plan) -> "Apart":
        return cls(
            **{each.name: getattr(plan, each.name) for each in fields(plan)}
            | {"shared_noise": False}
        )

    def initial_noise(self, slots: Sequence[int], device: torch.device) -> Tensor:
        return super().initial_noise([slot - slot % self.group_size for slot in slots], device)


class ApartSet(TrainingSet):
    """A training set whose plans are `Apart`."""

    def plan(self, recipe: Recipe, iteration: int) -> Plan:
        return Apart.of(super().plan(recipe, iteration))


def keep_apart(session: Session) -> None:
    """Have a session compute each sample on its own."""
    session.training = ApartSet(**vars(session.training))


class Theirs:
    """The public way, on the prompts of one of our sessions."""

    def __init__(self, public: Public, session: Session) -> None:
        self.public, self.session = public, session
        self.network = public.policy.network
        self.kept = self.done = 0
        self.texts: list[str] = []
        self.samples: list[Sample] = []

    def iterate(self) -> dict[str, float]:
        recipe, session = self.public.recipe, self.session
        start = time.perf_counter()
        self.texts, conditions = session.training.batch(recipe, self.done)
        self.samples, seconds = self.public.iterate(self.done, self.texts, conditions)
        self.done += 1
        self.kept = held_bytes([(sample.states, sample.log_probs) for sample in self.samples])
        return seconds | {"total": time.perf_counter() - start}

    def rewards(self) -> Tensor:
        """Of the samples' pixels, which are what our trainer scores."""
        group = self.public.recipe.rollout.samples_per_prompt
        rows = [
            self.public.score(sample.pixels, self.texts[sample.slot // group])
            for sample in self.samples
        ]
        return self._of_all_ranks(rows)

    def rewards_of_files(self) -> Tensor:
        """As the public way scored the samples; likewise [samples, weighted parts]."""
        return self._of_all_ranks([sample.scores for sample in self.samples])

    def _of_all_ranks(self, rows: list[Tensor]) -> Tensor:
        total = len(self.texts) * self.public.recipe.rollout.samples_per_prompt
        return self.session.world.combine(
            torch.stack(rows), [sample.slot for sample in self.samples], total
        )


def plain(recipe: Recipe) -> list[str]:
    """Overrides that turn every saving off."""
    each = range(len(recipe.rewards))
    return [
        *PLAIN,
        *(f"rewards.{n}.where=process" for n in each),
        *(f"rewards.{n}.batch_size=1" for n in each),
    ]


def open_session(recipe: Recipe, world: World, stack: ExitStack) -> Session:
    """Our trainer, without its lines on the terminal."""
    with redirect_stdout(io.StringIO()):
        return open_ours(recipe, world, stack, *claim(recipe, world, stack))


def open_ways(
    file: Path,
    overrides: Sequence[str],
    window: Sequence[str],
    world: World,
    folder: Path,
    stack: ExitStack,
) -> dict[str, Way]:
    """All contenders, each with a model of its own in the same state."""
    common = [*overrides, f"prompts.cache={folder / 'embeddings'}"]
    recipe = config.load(file, [*common, f"run.dir={folder / 'ours'}"])
    sessions = {"ours": open_session(recipe, world, stack)}
    for name, more in (("plain", plain(recipe)), ("window", window)):
        chosen = config.load(file, [*common, *more, f"run.dir={folder / name}"])
        sessions[name] = open_session(chosen, world, stack)
    if recipe.rollout.shared_noise:
        keep_apart(sessions["plain"])
    public = Public.open(recipe, world, folder / "videos", sessions["ours"].policy.negative)
    return {
        "public": Theirs(public, sessions["ours"]),
        **{name: Ours(sessions[name]) for name in ("plain", "ours", "window")},
    }
