"""Samplers: the ODE as their limit, marginals in closed form, log-probabilities, one time per
row.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import samplers
from fastgrpo.algorithm.transitions import (
    clean_estimate,
    ddim_transition,
    gaussian_log_prob,
    sde_transition,
    time_grid,
)
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from tests.harness import runs

MEAN, STD = 0.7, 0.4  # of the data in the closed form
ETA = {
    "dance": 0.3,
    "flow": 0.7,
    "linear": 1.0,
    "cps": 0.8,
    "precise": 0.7,
}  # their authors' levels


def exact_velocity(x: Tensor, t: Tensor, std: float) -> Tensor:
    """E[e - x_0 | x_t = x] for data N(MEAN, std^2) and noise N(0, 1)."""
    variance = (1 - t) ** 2 * std**2 + t**2
    surprise = (x - (1 - t) * MEAN) / variance
    return t * surprise - (MEAN + (1 - t) * std**2 * surprise)


def drawn(name: str, eta: float, steps: int, std: float) -> list[tuple[Tensor, Tensor]]:
    """(t, x) after each step of a sampler but the last one, and x_0, from 20,000 draws of noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    grid, states = time_grid(steps, 1.0), []
    for t, t_next in pairwise(grid[:-1]):
        mean, spread = samplers.known[name].transition(
            x, v=exact_velocity(x, t, std), t=t, t_next=t_next, eta=eta
        )
        x = mean + spread * torch.randn(x.shape, generator=generator)
        states.append((t_next, x))
    return [*states, (grid[-1], clean_estimate(x, exact_velocity(x, grid[-2], std), grid[-2]))]


@pytest.mark.parametrize("name", ["dance", "flow", "linear", "precise"])
def test_the_stochastic_differential_equations_keep_the_marginal(name: str) -> None:
    x = drawn(name, ETA[name], 200, STD)[-1][1]
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("name", ["flow", "precise"])
def test_a_grid_that_begins_a_rounding_below_one_is_one_that_begins_at_one(name: str) -> None:
    """UniPC's, and so Wan's, begins at 1 - 1e-6, where the noise level is a million in place of
    infinite.
    """
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    t_next = time_grid(20, 3.0)[1]
    whole, near = (
        samplers.known[name].transition(x, v=v, t=torch.tensor(t), t_next=t_next, eta=ETA[name])
        for t in (1.0, 1.0 - 1e-6)
    )
    assert 0.5 < torch.as_tensor(whole[1]).max() < 1.0
    for one, other in zip(whole, near, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_cps_keeps_the_coefficients_and_narrows_what_is_not_a_point() -> None:
    # even in few steps: where the data is one point, noise is exact
    for t, x in drawn("cps", ETA["cps"], 8, 1e-6):
        assert x.mean().item() == pytest.approx((1 - t.item()) * MEAN, abs=0.02)
        assert x.std().item() == pytest.approx(t.item(), abs=0.02)
    x = drawn("cps", ETA["cps"], 200, STD)[-1][1]
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() < 0.9 * STD


@pytest.mark.parametrize("name", sorted(samplers.known))
def test_without_noise_every_sampler_is_the_euler_step(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    for t, t_next in pairwise(time_grid(5, 7.0)):
        mean, std = samplers.known[name].transition(x, v=v, t=t, t_next=t_next, eta=0.0)
        torch.testing.assert_close(mean, x - (t - t_next) * v)
        assert not torch.as_tensor(std).any()


@pytest.mark.parametrize("name", sorted(samplers.known))
def test_one_time_per_row_equals_one_time_for_all(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = samplers.known[name]
    x, v = torch.randn(3, 2, 2, generator=generator), torch.randn(3, 2, 2, generator=generator)
    t, t_next = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.8, 0.3, 0.1])
    mean, std = sampler.transition(x, v=v, t=t, t_next=t_next, eta=0.5)
    log_prob = sampler.log_prob(x, mean, std)
    for row in range(3):
        single = sampler.transition(
            x[row : row + 1], v=v[row : row + 1], t=t[row], t_next=t_next[row], eta=0.5
        )
        torch.testing.assert_close(mean[row : row + 1], single[0])
        torch.testing.assert_close(std[row].flatten()[0], single[1])
        torch.testing.assert_close(log_prob[row], sampler.log_prob(x[row : row + 1], *single)[0])


def test_the_noise_levels_are_those_of_the_papers() -> None:
    x = torch.zeros(1, 1)
    a, b = torch.tensor(0.8), torch.tensor(0.6)
    flow = samplers.flow_transition(x, v=x, t=a, t_next=b, eta=0.7)[1]
    torch.testing.assert_close(flow, 0.7 * (a / (1 - a)).sqrt() * (a - b).sqrt())
    s = torch.linspace(0.6, 0.8, 100_001, dtype=torch.float64)
    area = torch.trapezoid(s / (1 - s), s).float()
    precise = samplers.precise_transition(x, v=x, t=a, t_next=b, eta=0.7)[1]
    torch.testing.assert_close(precise, 0.7 * area.sqrt())
    assert precise < flow
    one = torch.tensor(1.0)
    # capped where the level is infinite
    for transition in (
        samplers.flow_transition,
        samplers.precise_transition,
    ):
        torch.testing.assert_close(
            transition(x, v=x, t=one, t_next=b, eta=0.7)[1], torch.tensor(0.7)
        )
    torch.testing.assert_close(samplers.cps_transition(x, v=x, t=a, t_next=b, eta=1.0)[1], b)


def test_the_linear_level_is_between_the_grids_second_time_and_its_last() -> None:
    """s = eta (s_last + (s_first - s_last) t), and DanceGRPO's step with that level."""
    grid, eta = time_grid(20, 3.0), 0.9
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    scaled = samplers.noise_level("linear", eta, grid)
    for t, t_next in pairwise(grid[:11]):
        level = eta * (grid[-1] + (grid[1] - grid[-1]) * t)
        mean, std = samplers.known["linear"].transition(x, v=v, t=t, t_next=t_next, eta=scaled)
        expected, spread = sde_transition(x, v=v, t=t, t_next=t_next, eta=level.item())
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(std, spread)
    assert samplers.noise_level("dance", eta, grid) == eta


def test_cps_leaves_out_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean, other = (torch.randn(2, 3, 4, generator=generator) for _ in range(3))
    std = torch.tensor(0.3)
    cps, gaussian = samplers.known["cps"].log_prob, samplers.known["flow"].log_prob
    torch.testing.assert_close(
        cps(x, mean, std) - cps(x, other, std),
        (gaussian(x, mean, std) - gaussian(x, other, std)) * 2 * std**2,
    )


class Plain:
    """As much of a policy as a sampler asks for."""

    def __init__(self, alphas: bool) -> None:
        self.alphas = alphas

    def transition(
        self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        return (
            (ddim_transition(x, epsilon=v, alpha=1 - t, alpha_next=1 - t_next, eta=eta))
            if self.alphas
            else sde_transition(x, v=v, t=t, t_next=t_next, eta=eta)
        )


def test_a_diffusion_model_has_its_own_step_alone() -> None:
    flow, diffusion, cpu = Plain(False), Plain(True), torch.device("cpu")
    for name in samplers.known:
        samplers.check(flow, name, cpu)  # type: ignore[arg-type]
    samplers.check(diffusion, "dance", cpu)  # type: ignore[arg-type]
    own = samplers.Sampler(diffusion.transition, gaussian_log_prob)
    assert samplers.of(diffusion, "dance") == own  # type: ignore[arg-type]
    assert samplers.of(flow, "cps") is samplers.known["cps"]  # type: ignore[arg-type]
    with pytest.raises(
        UserError,
        match=r"rollout\.sampler=cps: a step of rectified flows, which this model is not; use",
    ):
        samplers.check(diffusion, "cps", cpu)  # type: ignore[arg-type]


def test_cps_cannot_replace_more_than_all_noise() -> None:
    assert config.load(runs.RECIPE, ["rollout.sampler=cps", "rollout.eta=1.0"]).rollout.eta == 1.0
    with pytest.raises(UserError, match=r"rollout\.eta=1\.2: for rollout\.sampler=cps"):
        config.load(runs.RECIPE, ["rollout.sampler=cps", "rollout.eta=1.2"])
