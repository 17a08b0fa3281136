"""AWM on the tiny model: the ratio, the update's gradient, that it learns, and a run that resumes."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.algorithm import noise, selection
from fastgrpo.core.config import Objective
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.parallel.world import World
from fastgrpo.training.methods.awm import METHOD
from fastgrpo.training.rollout import Drawn, Plan, Trajectory
from tests.fastgrpo.training.test_nft import (
    TOTAL,
    assert_same_gradient,
    moved,
    plain_policies,
)
from tests.harness import runs, tiny

SETTINGS = Objective(kind="awm", awm_weighting="t", clip_range=1e-4)
TRAINED = 3


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def update(
    trainer: tiny.Recorder,
    plan: Plan,
    drawn: Drawn,
    conditions: list[Condition],
    world: World,
    objective: Objective = SETTINGS,
) -> dict[str, float]:
    trajectories = {
        slot: Trajectory(dict(one.states)) for slot, one in drawn.trajectories.items()
    }  # without what an update before has evaluated
    return tiny.run_update(
        trainer,
        the_plan=plan,
        trajectories=trajectories,
        conditions=conditions,
        world=world,
        objective=objective,
    )


def matching(
    policy: Policy, plan: Plan, drawn: Drawn, condition: Condition, at: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """A policy's velocity and t |v - (e - x_0)|^2 at a noised sample, from the keyed noise itself."""
    slot, step = at
    key = ("noised", plan.seed, plan.iteration, *divmod(slot, tiny.GROUP), step)
    e = noise.normal([key], plan.latent_shape, tiny.device())
    t, x_0 = plan.grid[step], drawn.final[slot][None]
    v = policy.velocity((1 - t) * x_0 + t * e, t[None], condition)
    return v, t * (v - (e - x_0)).square().mean()


def chosen(plan: Plan, slots: list[int]) -> list[tuple[int, int]]:
    return [at for at in product(slots, range(plan.steps)) if at[1] in plan.chosen(at[0])]


def test_the_trained_policy_draws(conditions: list[Condition], world: World) -> None:
    trainer, plan, drawn = moved(world, conditions, "awm", 5)
    trainer.ema.clear()
    again = tiny.draw_by(METHOD, trainer, plan, conditions, range(TOTAL), 4)
    assert torch.equal(again.final, drawn.final)


def test_gradient_equals_plain_autograd_of_the_objective(
    conditions: list[Condition], world: World
) -> None:
    """-A log p, whose value does not matter at ratio 1, and the pull to the average."""
    trainer, plan, drawn = moved(world, conditions, "awm", 5)
    update(trainer, plan, drawn, conditions, world)
    plain, average = plain_policies()
    advantages, loss = tiny.advantages().to(tiny.device()), torch.zeros((), device=tiny.device())
    for at in chosen(plan, list(range(TOTAL))):
        condition = stack([conditions[at[0] // tiny.GROUP]])
        v, error = matching(plain, plan, drawn, condition, at)
        with torch.no_grad():
            v_average, _ = matching(average, plan, drawn, condition, at)
        drift = (v - v_average).square().mean()
        loss = loss + (advantages[at[0]] * error + 0.1 * drift) / (TOTAL * TRAINED)
    loss.backward()
    assert_same_gradient(trainer, plain)


def test_the_ratio_is_one_until_the_policy_moves(conditions: list[Condition], world: World) -> None:
    """Exactly, in the later step too; the old policy is evaluated for that step alone."""
    trainer, plan, drawn = moved(world, conditions, "awm", 5)
    for updates, lr in product((1, 2), (1e-30, 1e-3)):
        trainer.settings = tiny.settings(5, updates=updates, lr=lr, ema_decay=0.5)
        metrics = update(trainer, plan, drawn, conditions, world)
        assert metrics["update/evaluated_again"] == TOTAL * TRAINED * (1 if updates == 1 else 1.5)
        assert metrics["update/max_log_ratio_first"] == 0.0
        moves = updates == 2 and lr == 1e-3
        assert (metrics["update/max_log_ratio"] > 0.0) == moves
        assert (metrics["update/clip_fraction"] > 0.0) == moves


def test_the_ratio_is_that_of_the_weights_before_and_after_a_step(
    conditions: list[Condition], world: World
) -> None:
    trainer, plan, drawn = moved(world, conditions, "awm", 5)
    trainer.settings = tiny.settings(5, updates=2, lr=1e-4, ema_decay=0.5)
    weights: list[dict[str, Tensor]] = []
    step = trainer.step

    def recorded() -> Tensor:
        norm = step()
        named = trainer.policy.network.named_parameters()
        full = {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in named}
        weights.append({name: value.detach().clone() for name, value in full.items()})
        return norm

    trainer.step = recorded  # type: ignore[method-assign]
    metrics = update(trainer, plan, drawn, conditions, world)
    before, after = tiny.load_policy(), tiny.load_policy()
    after.network.load_state_dict(weights[0])
    everyone = torch.ones(TOTAL, dtype=torch.bool)
    key = ("minibatches", plan.seed, plan.iteration)
    largest = 0.0
    for at in chosen(plan, selection.minibatches(everyone, tiny.GROUP, 2, key)[1]):
        condition = stack([conditions[at[0] // tiny.GROUP]])
        with torch.no_grad():
            errors = [matching(p, plan, drawn, condition, at)[1].item() for p in (before, after)]
        largest = max(largest, abs(errors[1] - errors[0]))
    assert largest > 1e-4
    assert metrics["update/max_log_ratio"] == pytest.approx(largest, rel=1e-2)


@pytest.mark.parametrize("weighting", ["uniform", "ghuber"])
def test_updates_make_rewarded_samples_likelier_and_others_less_likely(
    conditions: list[Condition], world: World, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the matching error with noise that training has not seen."""
    trainer, plan, drawn = moved(world, conditions, "awm", 12)
    advantages = torch.tensor([3.0, -3.0]).repeat(TOTAL // 2)
    monkeypatch.setattr(tiny, "advantages", lambda: advantages)
    trainer.settings = tiny.settings(12, lr=2e-4, ema_decay=0.999999)
    settings = SETTINGS.model_copy(update={"awm_weighting": weighting, "awm_average": 0.0})
    fresh = replace(plan, seed=99)

    def errors() -> Tensor:
        """[TOTAL], over the times of the grid."""
        total = torch.zeros(TOTAL)
        with torch.no_grad():
            for slot, step in product(range(TOTAL), range(plan.steps)):
                condition = stack([conditions[slot // tiny.GROUP]])
                total[slot] += matching(trainer.policy, fresh, drawn, condition, (slot, step))[1]
        return total

    before = errors()
    for _ in range(4):
        update(trainer, plan, drawn, conditions, world, settings)
    change = errors() / before - 1
    assert change[advantages > 0].mean() < change[advantages < 0].mean()
    assert change[advantages < 0].mean() > 0


@pytest.mark.slow
def test_a_resumed_run_has_the_average_and_the_weights_of_one_that_was_not_stopped(
    tmp_path: Path,
) -> None:
    awm = [
        *runs.SMALLER,
        "objective.kind=awm",
        "rollout.shared_noise=false",
        "objective.awm_average=1.0",
    ]
    runs.succeed(tmp_path / "whole", awm)
    runs.succeed(tmp_path / "parts", [*awm, "run.iterations=1"])
    runs.succeed(tmp_path / "parts", awm)
    whole, parts = (runs.checkpoint(tmp_path / name, 2, tmp_path) for name in ("whole", "parts"))
    runs.assert_same_checkpoint(whole, parts)
    second = runs.metrics(tmp_path / "whole")[1]
    assert second["update/evaluated_again"] == 1.5 * second["update/transitions"]
    assert second["update/max_log_ratio_first"] == 0.0 < second["update/max_log_ratio"]
