"""Time grids, transitions and log-probabilities: pure functions, float32.

Times run from t = 1 (noise) to t = 0 (data). Rollout and update call the same functions: the
rollout draws from (mean, std), the update scores what was drawn.
"""

import math

import torch
from torch import Tensor


def time_grid(num_steps: int, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """The times t = s u / (1 + (s - 1) u) over u = linspace(1, 0, T + 1).

    A shift s > 1 spends more steps at high noise (Stable Diffusion 3, eq. 23; DanceGRPO, section
    4).  returns float32 [T + 1], from 1 to 0
    """
    u = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).to(device, torch.float32)


def column(t: Tensor, x: Tensor) -> Tensor:
    """A scalar or [B] made to broadcast against x [B, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim == 1 else t


def sde_transition(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Mean and std of p(x_next | x), one Euler-Maruyama step of a rectified flow's reverse SDE.

    dx = (v - eta^2 / 2 * score) dt + eta dw with score = -(x + (1 - t) v) / t (DanceGRPO, eq. 8);
    eta = 0 is the ODE's Euler step.

    x, v: [B, ...] float32;  t, t_next: scalars or [B], 1 >= t > t_next >= 0
    returns mean [B, ...] and std, which broadcasts against it
    """
    t, t_next = column(t, x), column(t_next, x)
    dt = t_next - t
    score = -(x + (1 - t) * v) / t
    mean = x + (v - 0.5 * eta**2 * score) * dt
    return mean, eta * (-dt).sqrt()


def clean_estimate(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The x_0 = x - t v that velocity v predicts: also the last, deterministic step.

    x, v: [B, ...] float32;  t: scalar or [B];  returns [B, ...]
    """
    return x - column(t, x) * v


def ddim_transition(
    x: Tensor,
    epsilon: Tensor,
    alpha: Tensor,
    alpha_next: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Mean and std of p(x_next | x), one step of DDIM; eta = 1 is ancestral sampling.

    Song et al. 2021, eq. 12 and 16.

    x, epsilon: [B, ...] float32
    alpha, alpha_next: cumulative products at t and t_next, scalars or [B]
    returns mean [B, ...] and std, which broadcasts against it
    """
    alpha, alpha_next = column(alpha, x), column(alpha_next, x)
    std = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    x_0 = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
    return alpha_next.sqrt() * x_0 + (1 - alpha_next - std**2).sqrt() * epsilon, std


def gaussian_log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x_next; mean, std^2), averaged (not summed) over all dimensions but the first.

    The average is why the clip range is of the order of 1e-4 (DanceGRPO, section 4).

    x_next, mean: [B, ...] float32;  std: scalar or [B, 1, ...];  returns float32 [B]
    """
    density = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """KL divergence of two Gaussians of the same std, averaged over all dimensions but the first.

    mean, other: [B, ...] float32;  std: scalar or [B, 1, ...];  returns float32 [B]
    """
    return ((mean - other) ** 2 / (2 * std**2)).flatten(1).mean(1)
