"""Scouts: the best and the worst of cheap candidates are what is drawn again, from the same noise,
on any number of ranks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import scouts
from fastgrpo.core import config
from fastgrpo.core.config import Objective, Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.run.stopwatch import Stopwatch
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.tools.preflight.phases import scout_rounds
from fastgrpo.training import methods, rollout
from fastgrpo.training.scoring.drawing import Rollouts
from fastgrpo.training.scoring.scorer import Scored
from fastgrpo.training.scoring.scouts import candidates, scout
from fastgrpo.training.trainer import Trainer
from tests.fastgrpo.algorithm.test_window import counted
from tests.harness import runs, tiny

PER_PROMPT = ("rollout.window=1", "rollout.window_schedule=per_prompt")
BRANCHES = (*PER_PROMPT, "rollout.seeds_per_prompt=2")
NFT = ("objective.kind=nft", "rollout.shared_noise=false", "optimizer.ema_decay=0.5")
SCOUTS = ("rollout.scouts=6", "rollout.scout_steps=3")


def test_the_extremes_are_chosen_and_missing_scores_only_where_they_must() -> None:
    scores = torch.tensor([[3.0, 1.0, 5.0, 4.0, 0.0, 2.0], [0.0, 9.0, 8.0, 1.0, 2.0, 3.0]])
    valid = torch.ones(2, 6, dtype=torch.bool)
    assert scouts.choose(scores, valid, 4) == ((1, 2, 3, 4), (0, 1, 2, 3))
    valid[0, 2] = valid[0, 4] = False  # the best and the worst of the first prompt
    assert scouts.choose(scores, valid, 2) == ((1, 3), (0, 1))
    valid[1] = torch.tensor([False, False, False, False, True, False])
    assert scouts.choose(scores, valid, 2) == ((1, 3), (0, 4))
    valid[1, 4] = False
    assert scouts.choose(scores, valid, 2)[1] == (0, 1)


def ranks(scores: Tensor) -> list[float]:
    """The mean place of equal scores in their order.  scores: [M]"""
    order = sorted(scores.tolist())
    places = {x: [n for n, y in enumerate(order) if y == x] for x in order}
    return [float(np.mean(places[x])) for x in scores.tolist()]


def test_correlations_are_those_of_numpy_within_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 12, generator=generator)
    other = one + torch.randn(1, 12, generator=generator)
    other[0, 3] = other[0, 4]  # equal ones share a rank
    expected = np.corrcoef(ranks(one[0]), ranks(other[0]))[0, 1]
    assert scouts.rank_correlation(one, other) == pytest.approx(expected)
    plain = np.corrcoef(one[0].double(), other[0].double())[0, 1]
    assert scouts.correlation(one, other) == pytest.approx(plain)
    # what prompts differ in says nothing of the scouts
    apart = torch.tensor([[0.0], [100.0]])
    pair, swapped = torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[2.0, 1.0]] * 2)
    assert scouts.correlation(pair + apart, swapped + apart) == pytest.approx(-1)
    assert scouts.rank_correlation(pair + apart, pair.exp() - apart) == pytest.approx(1)
    lacking = torch.tensor([[1.0, 2.0, float("nan")]])
    known = torch.tensor([[1.0, 3.0, -9.0]])
    assert scouts.rank_correlation(lacking, known) == pytest.approx(1)
    assert scouts.rank_correlation(known, lacking) == pytest.approx(1)
    assert math.isnan(scouts.correlation(pair, torch.zeros(2, 2)))


@dataclass
class Meter:
    """A scorer whose reward is a latent's mean, so that a test can foretell it."""

    world: World
    arriving: int = 0
    rewards: dict[int, float] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def submit(
        self, slots: list[int], latents: Tensor, decoded: Any, prompts: Sequence[str]
    ) -> None:
        for slot, x, text in zip(slots, latents, prompts, strict=True):
            assert slot not in self.rewards
            self.rewards[slot], self.texts[slot] = x.mean().item(), text

    def collect(self, total: int, when_own: Any) -> Scored:
        when_own()
        values = torch.tensor([self.rewards.pop(slot) for slot in range(total)])
        fine = torch.ones(total, dtype=torch.bool)
        return Scored(values={"mean": values}, valid=fine, latents_finite=fine, pixels_finite=fine)


@pytest.fixture(scope="module")
def policy(world: World) -> Policy:
    return tiny.load_policy(world)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def recipe_of(*overrides: str) -> Recipe:
    size = ["prompts.per_iteration=3", "rollout.samples_per_prompt=4", "objective.best_of_n=none"]
    return config.load(runs.RECIPE, [*size, *SCOUTS, *overrides, "rollout.batch_size=5"])


@contextmanager
def ready(policy: Policy, world: World, recipe: Recipe) -> Iterator[tuple[Rollouts, Meter]]:
    """A reward of the latents' mean alone, in place of the recipe's."""
    trainer, meter = Trainer.create(policy, recipe.optimizer, None), Meter(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "weights", property(lambda recipe: {"mean": 1.0}))
        patch.setattr(type(policy), "decode", lambda policy, x, condition: None)
        yield (
            Rollouts(
                recipe=recipe,
                trainer=trainer,
                scorer=meter,  # type: ignore[arg-type]
                texts=tiny.PROMPTS,
                watch=Stopwatch(),
            ),
            meter,
        )


def test_the_noises_of_the_best_and_the_worst_are_drawn_again(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    recipe = recipe_of(*BRANCHES, "objective.advantage_clip=0.5")  # of no effect here
    plan = replace(tiny.plan(policy), noises=2, window=range(4), own_steps=(1, 3, 0), trained=1)
    grid = policy.time_grid(3, None, plan.latent_shape).to(plan.grid.device)
    of_scouts = candidates(plan, 6, grid)
    with ready(policy, world, recipe) as (rollouts, meter), counted(policy) as rows:
        found = scout(rollouts, conditions, of_scouts)
        told = found.metrics(recipe, found.scored)
    assert sum(rows) == 3 * 6 * 3 == told["scouts/evaluations"]
    assert meter.texts[17] == tiny.PROMPTS[2]
    # each candidate by itself: the ODE from the noise of its number
    apart = replace(plan, group_size=6, shared_noise=False, own_steps=(), window=None)
    for prompt in range(3):
        x = apart.initial_noise(range(prompt * 6, prompt * 6 + 6), plan.grid.device)
        condition = {name: torch.stack([t] * 6) for name, t in conditions[prompt].items()}
        with sharding.gathered(policy.network):
            means = rollout.sample_ode(policy, x, grid, condition).flatten(1).mean(1)
        rewards = found.scored.values["mean"][prompt * 6 : prompt * 6 + 6]
        torch.testing.assert_close(rewards, means.cpu(), atol=1e-5, rtol=1e-5)
        order = means.argsort().tolist()
        assert found.chosen[prompt] == tuple(sorted([order[0], order[-1]]))
        # what is drawn in full starts there, two samples from each
        again = replace(plan, candidates=found.chosen)
        slots = range(prompt * 4, prompt * 4 + 4)
        first, last = found.chosen[prompt]
        expected = x[torch.tensor([first, first, last, last])]
        assert torch.equal(again.initial_noise(slots, plan.grid.device), expected)


def test_as_many_steps_foretell_everything_where_the_ode_draws(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """Scouts of the samples' own grid: both correlations are 1, and the rewards the same."""
    recipe = recipe_of(*NFT, "rollout.scout_steps=5", "rollout.scouts=8")
    plan = methods.of("nft").plan(tiny.plan(policy, shared_noise=False), Objective())
    with ready(policy, world, recipe) as (rollouts, _):
        found = scout(rollouts, conditions, candidates(plan, 8, plan.grid))
        dealing = rollout.Dealing(
            conditions=conditions,
            plan=replace(plan, candidates=found.chosen),
            batch_size=5,
            world=world,
        )
        trajectories, scored = rollouts.draw(dealing)
        told = found.metrics(recipe, scored)
    assert len(trajectories) == 12
    assert told["scouts/rank_correlation"] == pytest.approx(1)
    assert told["scouts/correlation"] == pytest.approx(1, abs=1e-5)
    chosen = [prompt * 8 + number for prompt in range(3) for number in found.chosen[prompt]]
    rewards = found.scored.values["mean"][torch.tensor(chosen)]
    torch.testing.assert_close(scored.values["mean"], rewards, atol=1e-5, rtol=1e-5)
    assert told["scouts/reward"] == pytest.approx(found.scored.values["mean"].mean().item())


def test_lower_precision_rounds_and_leaves_float32_latents(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = candidates(tiny.plan(policy), 6, tiny.plan(policy).grid)
    rewards = []
    for precision in ((), ("rollout.scout_dtype=bfloat16",)):
        with ready(policy, world, recipe_of(*BRANCHES, *precision)) as (rollouts, _):
            rewards.append(scout(rollouts, conditions, plan).scored.values["mean"])
    difference = (rewards[0] - rewards[1]).abs().max()
    assert 1e-6 < difference < 0.05 and rewards[1].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NFT, BRANCHES], ids=["nft", "branches"])
def test_runs_of_one_and_two_ranks_scout_alike(kind: Sequence[str], tmp_path: Path) -> None:
    settings = [*runs.SMALLER, *kind, *SCOUTS, "rollout.steps=5", "prompts.per_iteration=3"]
    runs.succeed(tmp_path / "one", settings)
    runs.succeed(tmp_path / "two", [*settings, "distributed.rollout_weights=sharded"], ranks=2)
    one, two = runs.metrics(tmp_path / "one"), runs.metrics(tmp_path / "two")
    assert len(one) == len(two) == 2
    for alone, ranks in zip(one, two, strict=True):
        assert ranks["scouts/evaluations"] == alone["scouts/evaluations"] == 3 * 6 * 3
        for name in ("reward/sum", "scouts/reward", "scouts/correlation"):
            assert ranks[name] == pytest.approx(alone[name], abs=2e-3), name
        assert ranks["update/grad_norm"] == pytest.approx(alone["update/grad_norm"], rel=1e-2)
        assert abs(alone["scouts/rank_correlation"]) <= 1 and alone["scouts/invalid"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (PER_PROMPT, "rollout.scouts=6: a prompt's samples share one noise"),
        ((*PER_PROMPT, "rollout.seeds_per_prompt=8"), "must be above the 8 noises"),
        ((*BRANCHES, "rollout.scout_steps=6"), "rollout.scout_steps=6: a scout is to be cheaper"),
        (("rollout.seeds_per_prompt=2",), "with noise in every step a sample's initial noise"),
        (
            (*BRANCHES, "model.dtype=bfloat16", "rollout.scout_dtype=bfloat16"),
            "rollout.scout_dtype=bfloat16: is the precision of model.dtype already",
        ),
        (
            ("rollout.scouts=none", "rollout.scout_dtype=bfloat16"),
            "rollout.scout_dtype=bfloat16: has no effect without scouts",
        ),
        (
            (*PER_PROMPT, "rollout.seeds_per_prompt=3", "rollout.samples_per_prompt=12"),
            "so an even number",
        ),
    ],
)
def test_a_mistake_is_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        asked = ["objective.best_of_n=none", *SCOUTS, *overrides]
        methods.check(config.load(runs.RECIPE, asked))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_scouts_are_in_the_plan() -> None:
    asked, none = recipe_of(*NFT), recipe_of(*NFT, "rollout.scouts=none")
    assert network_calls.of_iteration(asked, 0).scouts == 3 * 6 * 3
    for groups in (1, 2, 4):
        more, less = (network_calls.rollout_work(of, groups) for of in (asked, none))
        each = math.ceil(18 / groups)
        assert more[0] - less[0] == each * 3
        assert more[1] - less[1] == math.ceil(each / 5) * 3


def test_scouts_are_in_preflights_sum() -> None:
    """Three prompts of six, in batches of five, on one group of ranks and on two."""
    for groups, rounds in ((1, 4), (2, 2)):
        parts: Any = SimpleNamespace(
            recipe=recipe_of(*NFT), texts=tiny.PROMPTS, world=SimpleNamespace(groups=groups)
        )
        assert scout_rounds(parts) == rounds
    parts.recipe = recipe_of(*NFT, "rollout.scouts=none")
    assert scout_rounds(parts) == 0
