"""DiffusionNFT on the tiny model: what is drawn and kept, the update's gradient, that it learns,
and a whole run.
"""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import noise, objectives
from fastgrpo.algorithm.objectives import Noised
from fastgrpo.algorithm.transitions import ddim_transition
from fastgrpo.core import config
from fastgrpo.core.config import Objective
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.parallel.world import World
from fastgrpo.training import methods, rollout
from fastgrpo.training.method import Experience
from fastgrpo.training.methods.nft import METHOD
from fastgrpo.training.methods.noised_samples import noised
from fastgrpo.training.rollout import Drawn, Plan
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests.fastgrpo.training.test_update import assert_gradients_equal
from tests.fastgrpo.training.test_update import run as run_ranks
from tests.harness import runs, tiny

TOTAL = len(tiny.PROMPTS) * tiny.GROUP
SETTINGS = Objective(kind="nft", nft_kl=0.0)


@pytest.fixture
def policy(world: World) -> Policy:
    return tiny.load_policy(world)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


def draw(policy: Policy, plan: Plan, conditions: list[Condition], size: int) -> Drawn:
    trainer = Trainer.create(policy, tiny.settings(size), None)
    return tiny.draw_by(METHOD, trainer, plan, conditions, range(TOTAL), size)


def run(
    trainer: Trainer,
    plan: Plan,
    drawn: Drawn,
    conditions: list[Condition],
    world: World,
    advantages: Tensor,
) -> float:
    kept = torch.ones(TOTAL, dtype=torch.bool)
    return update(
        trainer,
        SETTINGS,
        Experience(
            plan=plan,
            trajectories=drawn.trajectories,
            conditions=conditions,
            advantages=advantages,
            selected=kept,
        ),
        world,
    )["update/loss"]


def test_samples_are_the_odes_and_are_noised_with_their_keys(
    policy: Policy, conditions: list[Condition]
) -> None:
    plan = tiny.plan(policy, shared_noise=False)
    drawn, one_by_one = draw(policy, plan, conditions, 5), draw(policy, plan, conditions, 1)
    torch.testing.assert_close(one_by_one.final, drawn.final, atol=1e-5, rtol=1e-5)
    slot = 6
    condition = stack([conditions[slot // tiny.GROUP]])
    x = plan.initial_noise([slot], tiny.device())
    assert not torch.equal(x, plan.initial_noise([slot + 1], tiny.device()))
    torch.testing.assert_close(
        drawn.final[slot], rollout.sample_ode(policy, x, plan.grid, condition)[0]
    )
    trajectory = drawn.trajectories[slot]
    assert list(trajectory.states) == [plan.steps]  # which is all that waits for the update
    assert not trajectory.log_probs and not trajectory.velocities
    assert torch.equal(trajectory.states[plan.steps], drawn.final[slot])
    losses_of = METHOD.losses(policy, experience(plan, drawn, conditions), SETTINGS)
    for step in plan.chosen(slot):
        t, key = (
            plan.grid[step],
            ("noised", plan.seed, plan.iteration, *divmod(slot, tiny.GROUP), step),
        )
        x = (1 - t) * drawn.final[slot] + t * noise.normal([key], plan.latent_shape, tiny.device())
        torch.testing.assert_close(losses_of.states([(slot, step)]), x)


def experience(plan: Plan, drawn: Drawn, conditions: list[Condition]) -> Experience:
    return Experience(
        plan=plan,
        trajectories=drawn.trajectories,
        conditions=conditions,
        advantages=tiny.advantages(),
        selected=torch.ones(TOTAL, dtype=torch.bool),
    )


def moved(
    world: World, conditions: list[Condition], kind: str, update_batch: int
) -> tuple[tiny.Recorder, Plan, Drawn]:
    """A trainer whose average is not its policy, and what its method draws."""
    policy, method = tiny.load_policy(world), methods.of(kind)
    trainer = tiny.Recorder.create(policy, tiny.settings(update_batch, ema_decay=0.5), None)
    assert isinstance(trainer, tiny.Recorder)
    tiny.move_average(trainer)
    plan = method.plan(tiny.plan(policy, shared_noise=False), SETTINGS)
    return trainer, plan, tiny.draw_by(method, trainer, plan, conditions, range(TOTAL), 4)


def plain_policies() -> tuple[Policy, Policy]:
    """The trained policy and its moved average, as networks that nothing shards."""
    trained, average = tiny.load_policy(), tiny.load_policy()
    with torch.no_grad():
        for parameter in average.network.parameters():
            parameter.mul_(1.02)
    return trained, average


def assert_same_gradient(trainer: tiny.Recorder, plain: Policy) -> None:
    """The gradient of the first optimizer step, and what autograd left in `plain`."""
    grads = {name: p.grad for name, p in plain.network.named_parameters()}
    expected = {name: grad.cpu() for name, grad in grads.items() if grad is not None}
    assert trainer.gradients[0].keys() == expected.keys()
    difference = sum(
        (trainer.gradients[0][name] - grad).square().sum() for name, grad in expected.items()
    )
    assert difference <= 1e-10 * sum(grad.square().sum() for grad in expected.values())


def test_gradient_equals_plain_autograd_of_the_objective(
    conditions: list[Condition], world: World
) -> None:
    trainer, plan, drawn = moved(world, conditions, "nft", 5)
    run(trainer, plan, drawn, conditions, world, tiny.advantages())
    plain, old = plain_policies()
    loss = torch.zeros((), device=tiny.device())
    for slot, step in product(range(TOTAL), range(plan.steps)):
        if step not in plan.chosen(slot):
            continue
        x_0 = drawn.final[slot][None]
        x, t = noised(plan, [slot], [step], x_0)
        condition = stack([conditions[slot // tiny.GROUP]])
        with torch.no_grad():
            v_old = old.velocity(x, t, condition)
        v = plain.velocity(x, t, condition)
        advantage = tiny.advantages()[slot][None].to(tiny.device())
        loss = loss + objectives.nft(
            Noised(x=x, x_0=x_0, t=t, v=v, v_old=v_old, advantage=advantage), SETTINGS
        )[0] / (TOTAL * 3)
    loss.backward()
    assert_same_gradient(trainer, plain)


def test_the_old_policy_is_evaluated_for_selected_samples_alone(
    conditions: list[Condition], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the rows that go through the network without a gradient."""
    trainer, plan, drawn = moved(world, conditions, "nft", 3)
    selected = torch.arange(TOTAL) % tiny.GROUP < 2
    rows, velocity = [0], trainer.policy.velocity

    def counted(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows[0] += 0 if torch.is_grad_enabled() else len(x)
        return velocity(x, t, condition)

    monkeypatch.setattr(trainer.policy, "velocity", counted)
    metrics = tiny.run_update(
        trainer,
        the_plan=plan,
        trajectories=drawn.trajectories,
        conditions=conditions,
        world=world,
        kept=selected,
        objective=SETTINGS,
    )
    assert rows[0] == TOTAL // 2 * 3 == metrics["update/evaluated_again"]
    kept = {slot for slot, one in drawn.trajectories.items() if one.velocities}
    assert kept == set(selected.nonzero().flatten().tolist())


KINDS = [name for name in methods.known() if not methods.traits_of(name).noisy_steps]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_gradients_of_one(kind: str, tmp_path: Path) -> None:
    """Of both optimizer steps; the second rank drew fewer of the selected samples."""
    other = {"kept": [0, 1, 2, 3, 4, 6, 9, 10], "objective": {"kind": kind, "clip_range": 1.0}}
    alone, two = (run_ranks(tmp_path / str(ranks), ranks, 4, 1, other) for ranks in (1, 2))
    for step, tolerance in ((0, 2e-6), (1, 1e-5)):
        assert_gradients_equal(two["gradients"][step], alone["gradients"][step], tolerance)
    assert alone["metrics"]["update/transitions"] > 0
    for name in ("update/transitions", "update/loss", "update/evaluated_again"):
        assert two["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "refl"])
def test_ranks_that_share_sequences_give_the_gradients_of_one(kind: str, tmp_path: Path) -> None:
    """A pair's two rows, and a judge that each rank of the group asks."""
    other = {"kept": [0, 1, 2, 3, 4, 6, 9, 10], "objective": {"kind": kind}}
    alone = run_ranks(tmp_path / "1", 1, 4, 4, other)
    shared = run_ranks(tmp_path / "2", 2, 4, 4, other, sp=2)
    for step, tolerance in ((0, 2e-6), (1, 1e-5)):
        assert_gradients_equal(shared["gradients"][step], alone["gradients"][step], tolerance)
    for name in ("update/transitions", "update/loss", "update/evaluations"):
        assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-6)


def test_updates_make_rewarded_samples_likelier_and_others_less_likely(
    policy: Policy, conditions: list[Condition], world: World
) -> None:
    """Likelihood by its usual bound: how well noise is undone that training has not seen."""
    plan = replace(METHOD.plan(tiny.plan(policy, shared_noise=False), SETTINGS), trained=tiny.STEPS)
    drawn = draw(policy, plan, conditions, 12)
    fresh = replace(plan, seed=99)
    advantages = torch.tensor([5.0, -5.0]).repeat(TOTAL // 2)

    def errors() -> Tensor:
        """[TOTAL], over the times of the grid."""
        total = torch.zeros(TOTAL, device=tiny.device())
        for slots in rollout.batches(range(TOTAL), conditions, tiny.GROUP, 12):
            condition = stack([conditions[slot // tiny.GROUP] for slot in slots])
            for step in range(fresh.steps):
                x, t = noised(fresh, slots, [step] * len(slots), drawn.final[slots])
                with torch.no_grad():
                    v = policy.velocity(x, t, condition)
                off = x - t.reshape(-1, 1, 1, 1, 1) * v - drawn.final[slots]
                total[slots] += off.square().flatten(1).mean(1)
        return total.cpu()

    # an average that stays: the old policy of all three updates
    trainer = Trainer.create(policy, tiny.settings(60, lr=2e-4, ema_decay=0.999999), None)
    before = errors()
    losses = [run(trainer, plan, drawn, conditions, world, advantages) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    change = errors() / before - 1
    assert change[advantages > 0].mean() < 0 < change[advantages < 0].mean()


def test_a_run_draws_from_the_average(tmp_path: Path) -> None:
    """Its trained weights are ruined by the first step; the average, which draws the samples,
    hardly moves.
    """
    overrides = [
        *runs.SMALLER,
        "objective.kind=nft",
        "rollout.shared_noise=false",
        "optimizer.ema_decay=0.999999",
    ]
    overrides += [
        "optimizer.lr=0.1",
        "rollout.eta=0",
        "optimizer.updates_per_iteration=1",
        "objective.best_of_n=2",
    ]
    runs.succeed(tmp_path / "run", overrides)
    first, second = runs.metrics(tmp_path / "run")
    assert first["update/transitions"] == 2 * 2 * 3
    assert first["update/kl"] < 1e-9 < 0.1 < second["update/kl"]
    assert second["reward/sum"] > 0.5 * first["reward/sum"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["rollout.shared_noise=true"],
            "rollout.shared_noise=true: objective.kind=nft draws without noise on the way",
        ),
        (
            ["optimizer.ema_decay=0"],
            "optimizer.ema_decay=0: with objective.kind=nft the moving average",
        ),
        (["rollout.window=2"], "rollout.window: has no effect with objective.kind=nft"),
        (["rollout.sampler=cps"], "rollout.sampler=cps: has no effect with objective.kind=nft"),
        (
            ["objective.step_weights=noise"],
            "objective.step_weights=noise: has no effect with objective.kind=nft",
        ),
        (
            ["objective.kl_weight=0.1"],
            "objective.kl_weight=0.1: is of noisy steps, and objective.kind=nft has none",
        ),
    ],
)
def test_settings_that_do_not_go_with_it_are_named(overrides: list[str], complaint: str) -> None:
    good = [
        "objective.kind=nft",
        "rollout.shared_noise=false",
        "optimizer.ema_decay=0.5",
        "rollout.eta=0.0",
    ]
    assert methods.needs_initial_policy(config.load(runs.RECIPE, good))
    assert not methods.needs_initial_policy(
        config.load(runs.RECIPE, [*good, "objective.nft_kl=0.0"])
    )
    with pytest.raises(UserError, match=f"^{re.escape(complaint)}"):
        methods.check(config.load(runs.RECIPE, [*good, *overrides]))


AWM = ("objective.kind=awm", "rollout.shared_noise=false", "optimizer.ema_decay=0.9")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("rollout.shared_noise=true", "rollout.shared_noise=true: objective.kind=awm draws"),
        ("optimizer.ema_decay=0", "optimizer.ema_decay=0: objective.awm_average=0.1 pulls to"),
        ("rollout.window=2", "rollout.window: has no effect with objective.kind=awm"),
        ("rollout.sampler=flow", "rollout.sampler=flow: has no effect with objective.kind=awm"),
        ("objective.step_weights=noise", "objective.step_weights=noise: has no effect with"),
        ("objective.kl_weight=0.1", "objective.kl_weight=0.1: is of noisy steps"),
    ],
)
def test_settings_that_do_not_go_with_awm_are_named(override: str, complaint: str) -> None:
    methods.check(config.load(runs.RECIPE, AWM))
    without = ("objective.awm_average=0", "optimizer.ema_decay=0")
    methods.check(config.load(runs.RECIPE, [*AWM, *without]))
    assert not methods.needs_initial_policy(config.load(runs.RECIPE, AWM))
    assert methods.needs_initial_policy(config.load(runs.RECIPE, [*AWM, "objective.awm_kl=0.1"]))
    with pytest.raises(UserError, match=f"^{re.escape(complaint)}"):
        methods.check(config.load(runs.RECIPE, [*AWM, override]))


class Diffusion:
    """A policy whose steps are DDIM's."""

    def transition(
        self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        return ddim_transition(x, epsilon=v, alpha=1 - t, alpha_next=1 - t_next, eta=eta)


def test_a_diffusion_model_is_refused(policy: Policy) -> None:
    """But for a method that needs an estimate of x_0 alone, which every policy has."""
    for kind in (name for name in KINDS if not methods.traits_of(name).differentiates):
        method = methods.of(kind)
        method.check_policy(policy, tiny.device())
        with pytest.raises(
            UserError, match=rf"objective\.kind={kind}: is made for rectified flows"
        ):
            method.check_policy(Diffusion(), tiny.device())  # type: ignore[arg-type]
