"""In bfloat16 the ratio is 1 before the policy moves, however kernels round other batch sizes."""

from dataclasses import replace

import pytest
import torch

from fastgrpo.core.config import Model, Objective
from fastgrpo.core.policy import Condition, Policy
from fastgrpo.models.loading import policies
from fastgrpo.parallel import sharding
from fastgrpo.parallel.world import World
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import Dealing, Plan
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests.harness import rounding, tiny

pytestmark = pytest.mark.slow  # many small bfloat16 products

UPDATES, TRAINED = 2, 3
SLOTS = len(tiny.PROMPTS) * tiny.GROUP


@pytest.fixture(scope="module")
def policy(world: World) -> Policy:
    settings = Model(family="hunyuan_video", path=str(tiny.FOLDER), dtype="bfloat16")
    policy = policies.load(settings, tiny.device())
    sharding.shard(policy, world, torch.bfloat16)
    return policy


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def unmoved(
    policy: Policy,
    conditions: list[Condition],
    world: World,
    sizes: tuple[int, int],
    kind: str = "grpo",
    by_batch: bool = True,
) -> dict[str, float]:
    """The metrics of two optimizer steps that change nothing.

    sizes: of the rollout's batches and of the update's
    """
    plan: Plan = replace(tiny.plan(policy), trained=TRAINED)
    dealing = Dealing(conditions=conditions, plan=plan, batch_size=sizes[0], world=world)
    trainer = Trainer.create(policy, tiny.settings(sizes[1], updates=UPDATES, lr=1e-30), None)
    trainer.rounds_by_batch = by_batch
    with rounding.by_batch():
        drawn = tiny.draw(policy, plan, conditions, world, sizes[0])
        return update(
            trainer,
            Objective.model_validate({"kind": kind, "clip_range": 1e-5, "max_kl": 1e-9}),
            Experience(
                plan=plan,
                conditions=conditions,
                trajectories=drawn.trajectories,
                advantages=tiny.advantages(),
                selected=torch.ones(SLOTS, dtype=torch.bool),
                batch_sizes=dealing.batch_sizes(),
            ),
            world,
        )


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((2, 3), "grpo"),
        ((4, 5), "guard"),
        ((5, 5), "dppo"),
        ((12, 12), "grpo"),
    ],
)
def test_nothing_is_clipped_before_the_policy_moves(
    policy: Policy, conditions: list[Condition], world: World, sizes: tuple[int, int], kind: str
) -> None:
    metrics = unmoved(policy, conditions, world, sizes, kind)
    assert metrics["update/transitions"] == SLOTS * TRAINED
    assert metrics["update/clip_fraction"] == 0.0 and metrics["update/max_log_ratio"] == 0.0
    assert metrics["update/grad_norm"] > 0.0
    assert metrics["update/evaluated_again"] > 0.0


def test_what_it_is_for(policy: Policy, conditions: list[Condition], world: World) -> None:
    """With the rollout's log-probability the later step is clipped by rounding alone."""
    metrics = unmoved(policy, conditions, world, (2, 3), by_batch=False)
    assert metrics["update/max_log_ratio_first"] > 1e-4 < metrics["update/max_log_ratio"]
    assert metrics["update/clip_fraction"] > 0.1  # of both steps; the first is exact


def test_equal_batches_are_not_evaluated_again(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    metrics = unmoved(policy, conditions, world, (1, 1))
    assert metrics["update/evaluated_again"] == 0.0
    assert metrics["update/max_log_ratio"] == 0.0 == metrics["update/outside_first"]


def test_unequal_batches_are_evaluated_again_but_for_the_first_step(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """3 of 4 noisy steps of 12 samples; the shared state counts once per group and minibatch."""
    plan = replace(tiny.plan(policy), trained=TRAINED)
    metrics = unmoved(policy, conditions, world, (2, 3))
    later = SLOTS // UPDATES * TRAINED
    shared = sum(plan.firsts.start in plan.chosen(slot) for slot in range(SLOTS))
    assert later - shared <= metrics["update/evaluated_again"] <= later
