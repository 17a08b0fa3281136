"""Noisy steps of rectified flows by name: each a transition and its log-probability.

All are Euler steps of the ODE at eta = 0. The transition draws x_next and the update scores it, so
rollout and update must use the same pair. docs/guides/algorithms/algorithms.md says when to use
which.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.algorithm.transitions import column, gaussian_log_prob, sde_transition
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Policy


class Transition(Protocol):
    """A function from a state and its velocity to the mean and std of p(x_next | x)."""

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        t: Tensor,
        t_next: Tensor,
        eta: float,
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of one step.

        x, v: [B, ...] float32;  t, t_next: scalars or [B], 1 >= t > t_next >= 0
        returns mean [B, ...] and std, which broadcasts against it
        """


LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A policy's step: the mean and std of p(x_next | x), and the log-probability of x_next."""

    transition: Transition
    log_prob: LogProb
    """(x_next, mean, std) -> float32 [B]"""


def flow_transition(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's SDE step: DanceGRPO's step with the noise level eta sqrt(t / (1 - t)).

    Liu et al., Flow-GRPO, arXiv 2505.05470, the final update rule. The level is infinite at t = 1,
    where 1 - t is taken at the next time as in the authors' program; that step adds noise of
    variance eta^2.

    x, v: [B, ...] float32;  t, t_next: scalars or [B];  returns mean [B, ...] and std, [B, 1, ...]
    """
    t, t_next = column(t, x), column(t_next, x)
    level = eta**2 * t / (1 - torch.where(_at_one(t, t_next), t_next, t))
    return _noisy_step(x, v, t=t, t_next=t_next, variance=level * (t - t_next))


def linear_transition(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Flash-GRPO's step: DanceGRPO's step with a noise level eta t, linear in the time.

    The level that the coefficients of arXiv 2605.15980 imply is s_last + (s_first - s_last) t, with
    the grid's second and last time. The last is 0 here; the second is in eta, see `noise_level`.

    x, v: [B, ...] float32;  t, t_next: scalars or [B];  returns mean [B, ...] and std, [B, 1, ...]
    """
    t, t_next = column(t, x), column(t_next, x)
    return _noisy_step(x, v, t=t, t_next=t_next, variance=(eta * t) ** 2 * (t - t_next))


def noise_level(name: str, eta: float, grid: Tensor) -> float:
    """The eta that a recipe's sampler takes on a grid: "linear" has its level at t = 1 from there.

    Called once per run, since it waits for the device.  grid: float32 [T + 1] from 1 to 0
    """
    return eta * float(grid[1]) if name == "linear" else eta


def precise_transition(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """SAGE-GRPO's step: Flow-GRPO's squared noise level, integrated over the step.

    The variance eta^2 [ln((1 - t_next) / (1 - t)) - (t - t_next)] is the integral of
    eta^2 s / (1 - s) from t_next to t, and less than Flow-GRPO's (SAGE-GRPO, arXiv 2603.21872,
    section 3.2.1). The integral is infinite at t = 1, where the step is Flow-GRPO's.

    x, v: [B, ...] float32;  t, t_next: scalars or [B];  returns mean [B, ...] and std, [B, 1, ...]
    """
    t, t_next = column(t, x), column(t_next, x)
    within = ~_at_one(t, t_next)
    area = ((1 - t_next) / (1 - torch.where(within, t, t_next))).log() - (t - t_next)
    variance = eta**2 * torch.where(within, area, torch.ones_like(area))
    return _noisy_step(x, v, t=t, t_next=t_next, variance=variance)


def _at_one(t: Tensor, t_next: Tensor) -> Tensor:
    """Whether a step begins at t = 1 up to rounding: UniPC's grid begins at 1 - 1e-6.

    t, t_next: scalars or [B, 1, ...];  returns bool of the same shape
    """
    return 1 - t < 1e-3 * (t - t_next)


def _noisy_step(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ODE's step with noise, and half of the noise's variance along the score to balance it.

    x, v: [B, ...] float32;  t, t_next, variance: scalars or [B, 1, ...]
    returns mean [B, ...] and std, like variance
    """
    score = -(x + (1 - t) * v) / t
    return x - (t - t_next) * v + 0.5 * variance * score, variance.sqrt()


def cps_transition(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Flow-CPS: fresh noise replaces part of the predicted noise, whose level is exactly t_next.

    std = t_next sin(eta pi / 2), mean = (1 - t_next) x_0 + sqrt(t_next^2 - std^2) e with the
    predicted x_0 = x - t v and e = x + (1 - t) v (Wang and Yu, Coefficients-Preserving Sampling,
    arXiv 2509.05952).

    x, v: [B, ...] float32;  t, t_next: scalars or [B];  eta: 0 to 1
    returns mean [B, ...] and std, which broadcasts against it
    """
    t, t_next = column(t, x), column(t_next, x)
    angle = eta * math.pi / 2
    mean = (1 - t_next) * (x - t * v) + t_next * math.cos(angle) * (x + (1 - t) * v)
    return mean, t_next * math.sin(angle)


def squared_distance(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Flow-CPS' log-probability: the mean of -(x_next - mean)^2 over all dimensions but the first.

    The Gaussian log-probability without its variance: std is not used and all steps weigh alike
    (arXiv 2509.05952).

    x_next, mean: [B, ...] float32;  returns float32 [B]
    """
    return -((x_next - mean) ** 2).flatten(1).mean(1)


known: Mapping[str, Sampler] = {
    "dance": Sampler(sde_transition, gaussian_log_prob),
    "flow": Sampler(flow_transition, gaussian_log_prob),
    "linear": Sampler(linear_transition, gaussian_log_prob),
    "cps": Sampler(cps_transition, squared_distance),
    "precise": Sampler(precise_transition, gaussian_log_prob),
}


def of(policy: Policy, name: str) -> Sampler:
    """The sampler of a recipe for a policy; "dance" is the policy's own step (DDIM for SD 1)."""
    return Sampler(policy.transition, gaussian_log_prob) if name == "dance" else known[name]


def check(policy: Policy, name: str, device: torch.device) -> None:
    """Raise UserError where the sampler's steps are not made for the policy.

    Called once per run, since the check waits for the device.
    """
    if name != "dance" and not is_flow(policy, device):
        raise UserError(
            f"rollout.sampler={name}: a step of rectified flows, which this model is not; "
            "use dance, its own step."
        )


def is_flow(policy: Policy, device: torch.device) -> bool:
    """Whether the policy is a rectified flow: its step without noise is x - (t - t_next) v.

    device: the device of the policy's schedule
    """
    x, v = torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)
    t, t_next = (torch.tensor([time], device=device) for time in (0.5, 0.25))
    mean, _ = policy.transition(x, v, t=t, t_next=t_next, eta=0.0)
    return bool(torch.allclose(mean, x + (t_next - t) * v))
