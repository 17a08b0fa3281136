"""Rollout and update: ratio 1 before the first step, and independence of batch sizes and of the
number of ranks.
"""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.transitions import gaussian_log_prob, sde_transition
from fastgrpo.core.config import Objective
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.parallel.world import World
from fastgrpo.training.method import Experience
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests.harness import forks, tiny

TOTAL = len(tiny.PROMPTS) * tiny.GROUP


@pytest.fixture
def policy(world: World) -> Policy:
    return tiny.load_policy(world)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def test_ratio_is_one_before_the_first_update(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = tiny.plan(policy)
    for rollout_batch in (1, 2, 7):
        trajectories = tiny.draw(policy, plan, conditions, world, rollout_batch).trajectories
        for update_batch in (1, 2, 7):
            trainer = Trainer.create(policy, tiny.settings(update_batch, lr=1e-30), None)
            metrics = tiny.run_update(
                trainer,
                the_plan=plan,
                trajectories=trajectories,
                conditions=conditions,
                world=world,
            )
            assert metrics["update/transitions"] == TOTAL * 3
            assert metrics["update/max_log_ratio_first"] <= 1e-6, (rollout_batch, update_batch)


def test_old_log_probs_are_the_rollouts_not_the_updates(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """After an optimizer step the ratio must move; recomputed old log-probs would hold it at 1."""
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    trainer = Trainer.create(policy, tiny.settings(16, updates=2, lr=1e-3), None)
    metrics = tiny.run_update(
        trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
    )
    assert metrics["update/max_log_ratio_first"] <= 1e-6
    assert metrics["update/max_log_ratio"] > 1e-5


def test_gradient_equals_plain_autograd_of_the_objective(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    trainer = tiny.Recorder.create(policy, tiny.settings(8), None)
    assert isinstance(trainer, tiny.Recorder)
    tiny.run_update(
        trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
    )

    plain = tiny.load_policy()
    advantages = tiny.advantages().to(tiny.device())
    loss = torch.zeros((), device=tiny.device())
    for slot in range(TOTAL):
        for step in plan.chosen(slot):
            t, t_next = plan.grid[step], plan.grid[step + 1]
            x, x_next = (
                trajectories[slot].states[step][None],
                trajectories[slot].states[step + 1][None],
            )
            v = plain.velocity(x, t[None], stack([conditions[slot // tiny.GROUP]]))
            log_prob = gaussian_log_prob(
                x_next, *sde_transition(x, v=v, t=t, t_next=t_next, eta=plan.eta)
            )[0]
            # at ratio 1 the clipped objective's gradient is -A times the ratio's
            loss = loss - (log_prob - log_prob.detach()).exp() * advantages[slot] / (TOTAL * 3)
    loss.backward()
    grads = {name: p.grad for name, p in plain.network.named_parameters()}
    expected = {name: grad.cpu() for name, grad in grads.items() if grad is not None}
    assert_gradients_equal(trainer.gradients[0], expected, 1e-5)


@pytest.mark.slow
def test_one_and_two_ranks_and_any_batch_size_agree(tmp_path: Path) -> None:
    reference = run(tmp_path / "reference", 1, 4, 8)
    for ranks, rollout_batch, update_batch in ((2, 4, 8), (1, 1, 1), (1, 7, 64), (2, 3, 5)):
        other = run(
            tmp_path / f"{ranks}-{rollout_batch}-{update_batch}", ranks, rollout_batch, update_batch
        )
        for name in ("states", "final", "log_probs"):
            difference = other[name] - reference[name]
            assert difference.norm() <= 1e-6 * reference[name].norm(), name
            # single values: matmuls of other batch sizes round otherwise
            assert difference.abs().max() <= 1e-5, name
        assert_gradients_equal(other["gradients"][0], reference["gradients"][0], 1e-6)
        assert other["metrics"]["update/max_log_ratio_first"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "meshes"),
    [
        # the last of four ranks drew none of them
        ({"kept": [0, 1, 2, 3, 4, 5, 6, 7, 8]}, ((2, {}), (4, {}), (4, {"sp": 2}))),
        ({"kept": [0, 1, 2, 4, 5, 6, 7, 10], "window": [1, 4]}, ((2, {}), (4, {"shard": 2}))),
    ],
    ids=["a rank without samples", "window and Best-of-N"],
)
def test_dealt_states_give_the_gradient_of_one_rank(
    tmp_path: Path,
    other: dict[str, list[int]],
    meshes: tuple[tuple[int, dict[str, int]], ...],
) -> None:
    """Whoever drew them, and of the step after the first, too. One at a time, so that many move.

    2e-6: a sum of eight states in another order differed by 1.2e-6.
    """
    alone = run(tmp_path / "alone", 1, 4, 1, other)
    for number, (ranks, distributed) in enumerate(meshes):
        dealt = run(tmp_path / str(number), ranks, 4, 1, other, **distributed)
        steps = [(0, 2e-6), (1, 1e-5)]
        if not any(grad.any() for grad in alone["gradients"][1].values()):  # all are clipped
            steps, still = steps[:1], dealt["gradients"][1].values()
            assert not any(grad.any() for grad in still)
        for step, tolerance in steps:
            assert_gradients_equal(dealt["gradients"][step], alone["gradients"][step], tolerance)
        for name in ("update/transitions", "update/loss"):
            assert dealt["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-6)
        assert dealt["metrics"]["update/max_log_ratio_first"] <= 1e-6


def test_one_and_two_ranks_agree_bit_for_bit_where_their_batches_coincide(tmp_path: Path) -> None:
    """So the division of work changes nothing; other batch sizes change only how float32 matmuls
    round.
    """
    one, two = (run(tmp_path / str(ranks), ranks, 1, 4) for ranks in (1, 2))
    for name in ("states", "final", "log_probs"):
        assert torch.equal(one[name], two[name]), name
    assert_gradients_equal(two["gradients"][0], one["gradients"][0], 1e-6)


def run(
    file: Path,
    ranks: int,
    rollout_batch: int,
    update_batch: int,
    other: dict[str, Any] | None = None,
    **distributed: int,
) -> dict[str, Any]:
    arguments = [str(file), str(rollout_batch), str(update_batch), json.dumps(distributed)]
    arguments.append(json.dumps(other or {}))
    done = forks.run("tests.harness.workers.update", arguments, ranks if ranks > 1 else 0)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = torch.load(file, weights_only=True)
    return result


def assert_gradients_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Norm of the difference over norm: `tolerance` for the whole gradient, ten times it for each
    parameter.

    Single parameters may lose a digit, since their gradients are small differences of large terms.
    The key biases' true gradient is zero (softmax does not see them); they are compared with the
    whole's norm.
    """
    assert actual.keys() == expected.keys()
    whole = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    difference = torch.stack([(actual[name] - grad).norm() for name, grad in expected.items()])
    assert whole > 0 and difference.norm().item() <= tolerance * whole
    for (name, grad), distance in zip(expected.items(), difference.tolist(), strict=True):
        if name.endswith(("to_k.bias", "add_k_proj.bias")):
            assert distance <= tolerance * whole, name
        else:
            assert distance <= 10 * tolerance * grad.norm().item(), name


def test_trajectories_have_shared_noise_and_differ_afterwards(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = replace(tiny.plan(policy), trained=None)
    shared = tiny.states(tiny.draw(policy, plan, conditions, world, 4), plan)
    groups = shared.reshape(len(tiny.PROMPTS), tiny.GROUP, *shared.shape[1:])
    assert torch.equal(groups[:, :1, 0].expand_as(groups[:, :, 0]), groups[:, :, 0])
    assert not torch.equal(groups[0, 0, 0], groups[1, 0, 0])
    assert not torch.equal(groups[:, 0, 1], groups[:, 1, 1])
    apart = replace(plan, shared_noise=False)
    independent = tiny.states(tiny.draw(policy, apart, conditions, world, 4), apart)
    assert not torch.equal(independent[0, 0], independent[1, 0])


def test_stored_log_probs_are_those_of_the_stored_states(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = replace(tiny.plan(policy), trained=None)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    for slot, step in product((0, TOTAL - 1), range(plan.steps - 1)):
        x, t = trajectories[slot].states[step][None], plan.grid[step]
        with torch.no_grad():
            v = policy.velocity(x, t[None], stack([conditions[slot // tiny.GROUP]]))
        log_prob = gaussian_log_prob(
            trajectories[slot].states[step + 1][None],
            *sde_transition(x, v=v, t=t, t_next=plan.grid[step + 1], eta=plan.eta),
        )
        assert log_prob.item() == pytest.approx(trajectories[slot].log_probs[step].item(), abs=1e-6)


def test_invalid_samples_do_not_reach_the_gradient(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    kept = torch.ones(TOTAL, dtype=torch.bool)
    kept[[1, 6]] = False
    gradients = []
    for poison in (0.0, float("nan")):
        worse = {step: x + poison for step, x in trajectories[1].states.items()}
        poisoned = trajectories | {1: replace(trajectories[1], states=worse)}
        trainer = tiny.Recorder.create(policy, tiny.settings(8, lr=1e-30), None)
        assert isinstance(trainer, tiny.Recorder)
        metrics = tiny.run_update(
            trainer,
            the_plan=plan,
            trajectories=poisoned,
            conditions=conditions,
            world=world,
            kept=kept,
        )
        assert metrics["update/transitions"] == (TOTAL - 2) * 3
        gradients.append(trainer.gradients[0])
    for name, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][name])


def test_samples_of_advantage_zero_cost_nothing_and_count_in_the_mean(
    policy: Policy, conditions: list[Condition], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    kept, everyone = torch.ones(TOTAL, dtype=torch.bool), torch.arange(TOTAL)
    rows: list[int] = []
    real = policy.velocity

    def counting(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows.append(len(x))
        return real(x, t, condition)

    monkeypatch.setattr(policy, "velocity", counting)

    def updated(advantages: Tensor, **settings: float) -> tuple[tiny.Recorder, int]:
        rows.clear()
        trainer = tiny.Recorder.create(policy, tiny.settings(2, lr=1e-30), None)
        assert isinstance(trainer, tiny.Recorder)
        update(
            trainer,
            Objective(**settings),
            Experience(
                plan=plan,
                trajectories=trajectories,
                conditions=conditions,
                advantages=advantages,
                selected=kept,
            ),
            world,
        )
        return trainer, sum(rows)

    some = tiny.advantages() * (everyone >= tiny.GROUP)  # the first prompt's rewards were all equal
    almost = some + 1e-12 * (everyone < tiny.GROUP)
    (skipped, fewer), (evaluated, all_rows) = updated(some), updated(almost)
    assert fewer < 0.8 * all_rows
    assert_gradients_equal(skipped.gradients[0], evaluated.gradients[0], 1e-6)
    nothing, forwards = updated(torch.zeros(TOTAL))
    # AdamW's averages go on, as with any gradient of zero
    assert forwards == 1 and nothing.updates == 1
    assert all(not grad.any() for grad in nothing.gradients[0].values())


def test_non_finite_gradients_skip_the_step_and_end_the_run_at_the_limit(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    trajectories[0].states = {step: x * float("nan") for step, x in trajectories[0].states.items()}
    trainer = Trainer.create(policy, tiny.settings(8), None)
    before = [p.detach().clone() for p in policy.network.parameters()]
    for attempt in range(1, 4):
        metrics = tiny.run_update(
            trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
        )
        assert metrics["update/skipped"] == attempt
    assert all(torch.equal(a, b) for a, b in zip(before, policy.network.parameters(), strict=True))
    assert trainer.updates == 0
    with pytest.raises(
        UserError, match=r"optimizer.max_skipped=3: 4 optimizer steps had non-finite gradients"
    ):
        tiny.run_update(
            trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
        )


def test_kl_to_the_initial_policy_is_zero_before_the_first_step_and_pulls_back(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    reference = tiny.load_policy(world)
    reference.network.requires_grad_(False)
    trainer = Trainer.create(policy, tiny.settings(16, lr=1e-3), reference)
    first = tiny.run_update(
        trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
    )
    second = tiny.run_update(
        trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
    )
    assert first["update/kl"] < 1e-9 < second["update/kl"]


def test_ema_follows_its_recursion(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    plan = tiny.plan(policy)
    trajectories = tiny.draw(policy, plan, conditions, world, 4).trajectories
    settings = tiny.settings(16, lr=1e-3).model_copy(update={"ema_decay": 0.9})
    trainer = Trainer.create(policy, settings, None)
    start = {name: value.clone() for name, value in trainer.ema.items()}
    tiny.run_update(
        trainer, the_plan=plan, trajectories=trajectories, conditions=conditions, world=world
    )
    for name, parameter in policy.network.named_parameters():
        expected = 0.9 * start[name] + 0.1 * parameter.detach()
        torch.testing.assert_close(trainer.ema[name], expected)
