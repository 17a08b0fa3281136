"""DPO on the tiny model: the update's gradient, what is paired, what is refused."""

import re

import pytest
import torch

from fastgrpo.algorithm import noise, selection
from fastgrpo.core import config
from fastgrpo.core.config import Objective
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import stack
from fastgrpo.parallel.world import World
from fastgrpo.training import methods
from tests.fastgrpo.training.test_nft import TOTAL, assert_same_gradient
from tests.harness import runs, tiny

SETTINGS = Objective(kind="dpo", dpo_beta=3.0)
DPO = ["objective.kind=dpo", "rollout.shared_noise=false"]


def test_gradient_equals_plain_autograd_of_the_objective(world: World) -> None:
    """Both samples of a pair at the first one's times and noise, whatever the micro-batches."""
    conditions, method = tiny.encode(), methods.of("dpo")
    policy = tiny.load_policy(world)
    reference = tiny.moved_reference(world)
    trainer = tiny.Recorder.create(policy, tiny.settings(6), reference)
    plan = method.plan(tiny.plan(policy, shared_noise=False), SETTINGS)
    drawn = tiny.draw_by(method, trainer, plan, conditions, range(TOTAL), 6)
    selected = torch.ones(TOTAL, dtype=torch.bool)
    selected[5] = False  # the middle one of the three others has no partner
    metrics = tiny.run_update(
        trainer,
        the_plan=plan,
        trajectories=drawn.trajectories,
        conditions=conditions,
        world=world,
        kept=selected,
        objective=SETTINGS,
    )
    pairs = selection.pairs(tiny.advantages(), selected, tiny.GROUP)
    assert len(pairs) == 5
    plain, initial = tiny.load_policy(), tiny.moved_reference()
    loss, right = torch.zeros((), device=tiny.device()), 0
    for pair in pairs:
        condition = stack([conditions[pair[0] // tiny.GROUP]])
        for step in plan.chosen(pair[0]):
            key = ("noised", plan.seed, plan.iteration, *divmod(pair[0], tiny.GROUP), step)
            e, t = noise.normal([key], plan.latent_shape, tiny.device()), plan.grid[step]
            gaps = []
            for slot in pair:
                x_0 = drawn.final[slot][None]
                x = (1 - t) * x_0 + t * e
                with torch.no_grad():
                    known = (initial.velocity(x, t[None], condition) - (e - x_0)).square().mean()
                gaps.append(
                    (plain.velocity(x, t[None], condition) - (e - x_0)).square().mean() - known
                )
            loss = loss - torch.sigmoid(-1.5 * (gaps[0] - gaps[1])).log() / (len(pairs) * 3)
            right += bool(gaps[0] < gaps[1])
    loss.backward()
    assert isinstance(trainer, tiny.Recorder)
    assert_same_gradient(trainer, plain)
    assert metrics["update/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["update/dpo_accuracy"] == pytest.approx(right / (len(pairs) * 3))
    assert metrics["update/transitions"] == metrics["update/evaluations"] == 2 * len(pairs) * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.best_of_n=none"], "objective.best_of_n: missing; with objective.kind=dpo"),
        (["objective.best_of_n=2", "optimizer.batch_size=5"], "optimizer.batch_size=5: objective"),
        (["objective.best_of_n=2", "objective.kl_weight=0.1"], "use objective.dpo_beta"),
        (["objective.best_of_n=2", "rollout.shared_noise=true"], "set rollout.shared_noise=false"),
    ],
)
def test_what_dpo_cannot_work_with_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        methods.check(config.load(runs.RECIPE, [*DPO, *overrides]))


def test_the_initial_policy_is_always_needed() -> None:
    assert methods.needs_initial_policy(config.load(runs.RECIPE, DPO))
