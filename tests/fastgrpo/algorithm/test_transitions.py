"""The transition: goldens of the reference, the marginal in closed form, the ODE as its limit,
DDIM's goldens.
"""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor

from fastgrpo.algorithm.transitions import (
    clean_estimate,
    ddim_transition,
    gaussian_kl,
    gaussian_log_prob,
    sde_transition,
    time_grid,
)
from tests import GOLDENS

MEAN, STD = 0.7, 0.4  # of the data in the closed form


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDENS / name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def test_sde_step_equals_the_reference() -> None:
    tensors, metadata = load("flow_sde.safetensors")
    cases = json.loads(metadata["cases"])
    assert len(cases) == 9
    for case in cases:
        name, step = f"{case['case']}.{case['step']}", case["step"]
        grid = time_grid(case["num_steps"], case["shift"])
        torch.testing.assert_close(grid, tensors[f"{case['case']}.sigmas"], atol=1e-6, rtol=0)
        x, v, x_next = (tensors[f"{name}.{key}"] for key in ("x", "v", "x_next"))
        mean, std = sde_transition(x, v=v, t=grid[step], t_next=grid[step + 1], eta=case["eta"])
        torch.testing.assert_close(mean, tensors[f"{name}.mean"], atol=1e-5, rtol=0)
        assert std.item() == pytest.approx(case["std"], abs=1e-6)
        torch.testing.assert_close(
            gaussian_log_prob(x_next, mean, std), tensors[f"{name}.log_prob"], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            clean_estimate(x, v, grid[step]), tensors[f"{name}.x0"], atol=1e-5, rtol=0
        )


def test_ddim_equals_the_reference() -> None:
    tensors, metadata = load("ddim_sde.safetensors")
    scheduler = DDIMScheduler(**json.loads(metadata["scheduler"]))
    for case in json.loads(metadata["cases"]):
        x, eps, x_next = (tensors[f"{case['step']}.{key}"] for key in ("x", "eps", "x_next"))
        t = case["timestep"]
        alphas = scheduler.alphas_cumprod
        alpha_next = alphas[max(t - 1000 // case["num_steps"], 0)]
        mean, std = ddim_transition(
            x, epsilon=eps, alpha=alphas[t], alpha_next=alpha_next, eta=case["eta"]
        )
        log_prob = gaussian_log_prob(x_next, mean, std)
        torch.testing.assert_close(
            log_prob, tensors[f"{case['step']}.log_prob"], atol=1e-5, rtol=1e-5
        )


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[e - x_0 | x_t = x] for data N(MEAN, STD^2) and noise N(0, 1)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    surprise = (x - (1 - t) * MEAN) / variance
    return t * surprise - (MEAN + (1 - t) * STD**2 * surprise)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_noise_level_does_not_change_the_marginal(eta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    for t, t_next in pairwise(time_grid(200, 1.0)[:-1]):
        mean, std = sde_transition(x, v=exact_velocity(x, t), t=t, t_next=t_next, eta=eta)
        x = mean + std * torch.randn(x.shape, generator=generator)
    t = time_grid(200, 1.0)[-2]
    x = clean_estimate(x, exact_velocity(x, t), t)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)


def test_eta_to_zero_is_the_euler_step_of_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=[1 - k / 5 for k in range(5)])
    grid = time_grid(5, 7.0)
    torch.testing.assert_close(scheduler.sigmas, grid)
    expected = x
    for step, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, timestep, expected).prev_sample
        mean, std = sde_transition(x, v=v, t=grid[step], t_next=grid[step + 1], eta=1e-5)
        exact, zero = sde_transition(x, v=v, t=grid[step], t_next=grid[step + 1], eta=0.0)
        torch.testing.assert_close(mean, exact, atol=1e-6, rtol=0)
        assert std < 1e-5 and zero == 0.0
        x = exact
    torch.testing.assert_close(x, expected)


def test_one_time_per_row_equals_one_time_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(3, 2, 2, generator=generator), torch.randn(3, 2, 2, generator=generator)
    t, t_next = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.8, 0.3, 0.1])
    mean, std = sde_transition(x, v=v, t=t, t_next=t_next, eta=0.3)
    log_prob = gaussian_log_prob(x, mean, std)
    for row in range(3):
        single, single_std = sde_transition(
            x[row : row + 1], v=v[row : row + 1], t=t[row], t_next=t_next[row], eta=0.3
        )
        torch.testing.assert_close(mean[row : row + 1], single)
        torch.testing.assert_close(
            log_prob[row], gaussian_log_prob(x[row : row + 1], single, single_std)[0]
        )


def test_log_prob_and_kl_equal_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mean, other = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(3))
    std = torch.tensor(0.3)
    normal, reference = (
        torch.distributions.Normal(mean, std),
        torch.distributions.Normal(other, std),
    )
    torch.testing.assert_close(
        gaussian_log_prob(x, mean, std), normal.log_prob(x).flatten(1).mean(1)
    )
    kl = torch.distributions.kl_divergence(normal, reference)
    torch.testing.assert_close(gaussian_kl(mean, other, std), kl.flatten(1).mean(1))


def test_time_grid_ends_and_shift() -> None:
    grid = time_grid(5, 7.0)
    assert grid[0] == 1.0 and grid[-1] == 0.0 and grid.dtype == torch.float32
    torch.testing.assert_close(
        grid[1:5], torch.tensor([0.9655, 0.9130, 0.8235, 0.6364]), atol=5e-5, rtol=0
    )
