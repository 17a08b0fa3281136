"""Objectives: gradients against the policy gradient, what each of them stops, and the formulas as
plain arithmetic.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import objectives, samplers
from fastgrpo.algorithm.objectives import Noised, Terms
from fastgrpo.algorithm.transitions import gaussian_kl, gaussian_log_prob, time_grid
from fastgrpo.core.config import Objective
from fastgrpo.core.policy import Condition, shape_key
from fastgrpo.parallel.world import World
from fastgrpo.training import methods
from fastgrpo.training.method import Experience
from fastgrpo.training.methods.policy_gradient import PolicyGradient
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import update
from tests.harness import tiny

ADVANTAGES = [2.0, -1.5, 0.5]


def terms(
    mean: Tensor, old_mean: Tensor, x_next: Tensor, std: Tensor, advantage: Tensor, dt: Tensor
) -> Terms:
    log_prob, old_log_prob = (gaussian_log_prob(x_next, of, std) for of in (mean, old_mean))
    return Terms(
        log_prob=log_prob,
        old_log_prob=old_log_prob.detach(),
        mean=mean,
        old_mean=old_mean.detach(),
        std=std,
        advantage=advantage,
        dt=dt,
    )


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """old_mean, x_next, std, advantage and dt of three transitions."""
    generator = torch.Generator().manual_seed(seed)
    old_mean = torch.randn(3, 4, 5, generator=generator)
    std = torch.tensor([0.1, 0.2, 0.4]).reshape(3, 1, 1)
    x_next = old_mean + std * torch.randn(3, 4, 5, generator=generator)
    return old_mean, x_next, std, torch.tensor(ADVANTAGES), torch.tensor([0.05, 0.1, 0.2])


KINDS = [name for name in methods.known() if methods.traits_of(name).noisy_steps]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_the_old_policy_is_the_policy_gradient(kind: str) -> None:
    old_mean, x_next, std, advantage, dt = drawn()
    mean = old_mean.clone().requires_grad_()
    given = terms(mean, old_mean=old_mean, x_next=x_next, std=std, advantage=advantage, dt=dt)
    method = methods.of(kind)
    assert isinstance(method, PolicyGradient)
    method.loss(given, Objective(kind=kind)).sum().backward()
    assert mean.grad is not None
    # of log_prob with respect to the mean
    slope = (x_next - old_mean) / (std**2 * old_mean[0].numel())
    scale = std.flatten() / dt if kind == "guard" else torch.ones(3)
    torch.testing.assert_close(mean.grad, -(advantage * scale).reshape(3, 1, 1) * slope)


def test_clipping_is_the_formula_and_stops_what_went_far_enough() -> None:
    log_prob = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], requires_grad=True)
    nothing = torch.zeros(5, 1)
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0])
    given = Terms(
        log_prob=log_prob,
        old_log_prob=torch.zeros(5),
        mean=nothing,
        old_mean=nothing,
        std=torch.tensor(1.0),
        advantage=advantage,
        dt=torch.ones(5),
    )
    settings = Objective(clip_range=0.2)
    for loss in (objectives.grpo(given, settings), objectives.ddpo(given, settings)):
        up, down = math.exp(0.5), math.exp(-0.5)
        assert loss.tolist() == pytest.approx([-2.0, -2.0 * 1.2, 2.0 * up, 2.0 * 0.8, -2.0 * down])
        log_prob.grad = None
        loss.sum().backward()
        assert log_prob.grad is not None
        assert log_prob.grad.tolist() == pytest.approx([-2.0, 0.0, 2.0 * up, 0.0, -2.0 * down])
    assert objectives.outside_clip_range(given, settings).tolist() == [
        False,
        True,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("std", [0.01, 0.1, 1.0])
def test_the_normalised_ratio_is_centred_at_every_noise_level(std: float) -> None:
    """Of GRPO's log-ratio the mean is -KL; the normalised one's is 0, and its spread does not
    depend on std.
    """
    generator = torch.Generator().manual_seed(0)
    shift, dimensions, draws = 0.02, 16, 50_000
    old_mean = torch.zeros(draws, dimensions)
    x_next = std * torch.randn(draws, dimensions, generator=generator)
    one = torch.ones(draws)
    given = terms(
        old_mean + shift,
        old_mean=old_mean,
        x_next=x_next,
        std=torch.tensor(std),
        advantage=one,
        dt=one,
    )
    log_ratio = objectives.normalised_ratio(given).log()
    spread = shift / math.sqrt(dimensions)  # of the mean of e shift
    assert log_ratio.std().item() == pytest.approx(spread, rel=0.02)
    error = 5 * spread / math.sqrt(draws)
    assert log_ratio.mean().item() == pytest.approx(0.0, abs=error)
    assert objectives.normalised_ratio(given).mean().item() == pytest.approx(
        math.exp(spread**2 / 2), abs=error
    )
    plain = objectives.ratio(given).log()
    divergence = shift**2 / (2 * std**2)
    assert plain.mean().item() == pytest.approx(-divergence, abs=error / std)


def test_guard_clips_the_normalised_ratio() -> None:
    old_mean, x_next, std, advantage, dt = drawn()
    mean = (
        old_mean + 0.05 * std * (x_next - old_mean)
    ).requires_grad_()  # towards what was drawn: ratios above 1
    given = terms(mean, old_mean=old_mean, x_next=x_next, std=std, advantage=advantage, dt=dt)
    settings = Objective(kind="guard", clip_range=2e-6)
    r = ((x_next - old_mean) / std * (mean - old_mean)).detach().flatten(1).mean(1).exp()
    assert (r > 1 + 2e-6).all() and objectives.outside_normalised(given, settings).all()
    loss = objectives.guard(given, settings)
    expected = [-2.0 * (1 + 2e-6) / 0.05, 1.5 * r[1].item() / 0.1, -0.5 * (1 + 2e-6) / 0.2]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    assert mean.grad is not None
    assert [bool(row.any()) for row in mean.grad] == [False, True, False]


def test_dppo_stops_exactly_what_is_too_far_and_goes_further() -> None:
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(1, 30, generator=generator)
    std, cases = torch.tensor(0.1), []
    for sign in (1.0, -1.0):
        for direction in (1.0, -1.0):  # towards what was drawn, r > 1, or away from it
            for size in (1e-4, 1e-1):
                cases.append((sign, direction, size))
    old_mean = torch.zeros(len(cases), 30)
    x_next = (std * e).expand(len(cases), 30)
    mean = torch.cat([direction * size * std * e for _, direction, size in cases]).requires_grad_()
    advantage = torch.tensor([case[0] for case in cases])
    given = terms(
        mean,
        old_mean=old_mean,
        x_next=x_next,
        std=std,
        advantage=advantage,
        dt=torch.ones(len(cases)),
    )
    settings = Objective(kind="dppo", max_kl=1e-5)
    loss = objectives.dppo(given, settings)
    torch.testing.assert_close(loss, -objectives.ratio(given) * advantage)
    loss.sum().backward()
    assert mean.grad is not None
    stopped = [case for case, row in zip(cases, mean.grad, strict=True) if not row.any()]
    assert stopped == [(1.0, 1.0, 1e-1), (-1.0, -1.0, 1e-1)]
    far = gaussian_kl(mean, old_mean, std) > 1e-5
    assert torch.equal(objectives.outside_divergence(given, settings), far) and far.sum() == 4


@pytest.mark.parametrize("name", ["dance", "flow", "linear", "cps"])
def test_step_weights_equalise_the_gradients_and_have_mean_one(name: str) -> None:
    grid, eta, steps = time_grid(10, 3.0), 0.4, range(2, 7)
    sampler = samplers.known[name]
    t, t_next = grid[2:7], grid[3:8]
    dt, std = t - t_next, t_next * math.sin(eta * math.pi / 2)
    slope = {
        "dance": dt.sqrt() / eta * (1 + eta**2 * (1 - t) / (2 * t)),
        "flow": dt.sqrt() / (eta * (t / (1 - t)).sqrt()) * (1 + eta**2 / 2),
        # Flash-GRPO's c, of the level s = eta t
        "linear": dt.sqrt() / (eta * t) + eta * t * dt.sqrt() * (1 - t) / (2 * t),
        "cps": 2 * std * ((1 - t_next) * t - t_next * math.cos(eta * math.pi / 2) * (1 - t)),
    }[name]
    noise = {
        "dance": eta * dt.sqrt(),
        "flow": eta * (t / (1 - t) * dt).sqrt(),
        "linear": eta * t * dt.sqrt(),
        "cps": std,
    }[name]
    for kind, raw in (("equal", torch.ones(5)), ("gradient", 1 / slope), ("noise", noise)):
        weights = objectives.step_weights(kind, grid=grid, steps=steps, eta=eta, sampler=sampler)
        torch.testing.assert_close(weights[2:7], raw / raw.mean(), rtol=1e-4, atol=0)
        assert not weights[:2].any() and not weights[7:].any() and len(weights) == 10


def noised(advantage: float, v: Tensor, seed: int = 0) -> Noised:
    """Two samples whose old policy predicts badly; `v` is added to its prediction."""
    generator = torch.Generator().manual_seed(seed)
    x_0, e, off = (torch.randn(2, 3, 4, generator=generator) for _ in range(3))
    t = torch.tensor([0.3, 0.8])
    column = t.reshape(2, 1, 1)
    v_old = e - x_0 + 0.5 * off
    return Noised(
        x=(1 - column) * x_0 + column * e,
        x_0=x_0,
        t=t,
        v=v_old + v,
        v_old=v_old,
        advantage=torch.tensor([advantage] * 2),
    )


@pytest.mark.parametrize(
    ("advantage", "sign"), [(5.0, 1.0), (0.0, 0.0), (-5.0, -1.0), (2.5, 0.5), (50.0, 1.0)]
)
def test_nft_pulls_towards_good_samples_and_pushes_away_from_bad_ones(
    advantage: float, sign: float
) -> None:
    """At v = v_old the gradient is (2 q - 1) times that of a good sample; the step against it
    lowers its error.
    """
    v = torch.zeros(2, 3, 4, requires_grad=True)
    given = noised(advantage, v)
    (gradient,) = torch.autograd.grad(objectives.nft(given, Objective()).sum(), v)
    t = given.t.reshape(2, 1, 1)
    error = (given.x - t * given.v_old - given.x_0).detach()
    width = error.abs().flatten(1).mean(1).reshape(2, 1, 1)
    torch.testing.assert_close(gradient, sign * 5.0 * 2 * -t * error / (width * 12))
    if sign:
        moved = given.x - t * (given.v_old - 1e-3 * gradient) - given.x_0
        assert ((moved.square().sum() < error.square().sum()).item()) == (sign > 0)


def test_nft_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    given = noised(1.0, 0.3 * torch.randn(2, 3, 4, generator=generator))
    loss = objectives.nft(given, Objective(nft_beta=0.1, advantage_clip=4.0))
    q = 1.0 / 8 + 0.5
    for row in range(2):
        v, v_old, x, x_0 = (of[row].double() for of in (given.v, given.v_old, given.x, given.x_0))
        t, total = given.t[row].double(), 0.0
        for share, mixed in ((q, 0.9 * v_old + 0.1 * v), (1 - q, 1.1 * v_old - 0.1 * v)):
            error = x - t * mixed - x_0
            total += share * (error**2).mean().item() / error.abs().mean().item()
        assert loss[row].item() == pytest.approx(4.0 * total / 0.1, rel=1e-5)


def test_nft_is_least_at_the_better_of_two_policies() -> None:
    """Two samples share x, one good and one bad: descending the loss brings v to the good one's,
    and beyond.
    """
    x, t = torch.zeros(2, 1), torch.full((2,), 0.5)
    x_0 = torch.tensor([[1.0], [-1.0]])
    v = torch.zeros(1, 1, requires_grad=True)
    given = Noised(
        x=x,
        x_0=x_0,
        t=t,
        v=v.expand(2, 1),
        v_old=torch.zeros(2, 1),
        advantage=torch.tensor([5.0, -5.0]),
    )
    optimizer = torch.optim.SGD([v], lr=0.05)
    for _ in range(200):
        loss = objectives.nft(replace(given, v=v.expand(2, 1)), Objective()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (-0.5 * v).item() == pytest.approx(1.0, abs=0.05)


@pytest.fixture(scope="module")
def conditions() -> list[Condition]:
    return tiny.encode()


@pytest.mark.parametrize(
    ("sampler", "kind", "step_weights", "clip_range"),
    [
        ("dance", "guard", "equal", 2e-6),
        ("flow", "guard", "noise", 2e-6),
        ("precise", "ddpo", "gradient", 1e-4),
        ("cps", "dppo", "gradient", 1e-4),
    ],
)
def test_a_real_update_begins_at_the_policy_that_drew(
    world: World,
    conditions: list[Condition],
    sampler: str,
    kind: str,
    step_weights: str,
    clip_range: float,
) -> None:
    """Ratio 1 and nothing outside the trust region, with the old mean from the noise's key, for
    every objective.
    """
    policy = tiny.load_policy(world)
    plan = replace(tiny.plan(policy), sampler=sampler, trained=4)
    drawn = tiny.draw(policy, plan, conditions, world, 12)
    objective = Objective.model_validate(
        {"kind": kind, "step_weights": step_weights, "clip_range": clip_range}
    )
    trainer, kept = (
        Trainer.create(policy, tiny.settings(48, lr=1e-3), None),
        torch.ones(12, dtype=torch.bool),
    )
    lengths = [shape_key(condition) for condition in conditions]
    states = [13 * lengths.count(length) for length in lengths]  # a shared one, and 3 of 4 samples
    sizes = {slot: (states[slot // 4],) * 2 for slot in range(12)}
    first, second = (
        update(
            trainer,
            objective,
            Experience(
                plan=plan,
                trajectories=drawn.trajectories,
                conditions=conditions,
                advantages=tiny.advantages(),
                selected=kept,
                batch_sizes=sizes,
            ),
            world,
        )
        for _ in (1, 2)
    )
    assert first["update/max_log_ratio_first"] <= 1e-6 and first["update/outside_first"] == 0.0
    assert first["update/max_log_ratio"] == 0.0 == first["update/clip_fraction"]
    assert first["update/grad_norm"] > 0
    assert second["update/max_log_ratio_first"] > 1e-5 and second["update/outside_first"] > 0.5
