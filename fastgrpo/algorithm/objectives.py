"""The loss per transition: one pure function per algorithm.

Every log-probability and divergence is a mean over the latent's dimensions, see `transitions.py`.
docs/guides/algorithms/algorithms.md says when to use which.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastgrpo.algorithm.samplers import Sampler
from fastgrpo.algorithm.transitions import column, gaussian_kl
from fastgrpo.core.config import Objective


@dataclass(frozen=True, kw_only=True)
class Terms:
    """B transitions as an update sees them, float32.

    The "old" terms are of the policy that drew the transitions and have no gradient.
    """

    log_prob: Tensor  # [B]
    old_log_prob: Tensor  # [B]
    mean: Tensor  # [B, ...]: mean of p(x_next | x)
    old_mean: Tensor  # [B, ...]
    std: Tensor  # a scalar or [B, 1, ...], > 0
    advantage: Tensor  # [B]
    dt: Tensor  # [B]: t - t_next > 0


def grpo(terms: Terms, objective: Objective) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) with r = exp(log_prob - old_log_prob).

    DanceGRPO, arXiv 2505.07818, eq. 6.  returns [B], the loss of each transition
    """
    return _clipped(ratio(terms), terms.advantage, objective.clip_range)


def ddpo(terms: Terms, objective: Objective) -> Tensor:
    """DDPO with importance sampling and clipping (DDPO_IS of Black et al., arXiv 2305.13301).

    The expression for one transition is GRPO's; the advantage differs, which is normalised over all
    samples of the iteration (objective.normalise = "global"). DanceGRPO reports this baseline as
    diverging on flows.  returns [B], the loss of each transition
    """
    return grpo(terms, objective)


def guard(terms: Terms, objective: Objective) -> Tensor:
    """GRPO-Guard: the clipped objective of a normalised ratio, over dt.

    Wang et al., arXiv 2510.22319: RatioNorm (eq. 8) and the reweighting of gradients over steps.
    GRPO's log-ratio has a negative mean and a spread that grows as the noise falls, so clipping
    stops hardly any positive update. The normalised ratio is centred and spreads alike at all
    steps; its clip range is of order 2e-6.  returns [B], the loss of each transition
    """
    return _clipped(normalised_ratio(terms), terms.advantage, objective.clip_range) / terms.dt


def dppo(terms: Terms, objective: Objective) -> Tensor:
    """Flow-DPPO: -r A, without gradient where the policy is too far and would go further.

    Too far: a KL divergence from the old policy above max_kl. Further: A > 0 and r > 1, or A < 0
    and r < 1 (arXiv 2606.11025). The divergence of two Gaussians is exact, where a clipped ratio is
    one noisy draw of it.  returns [B], the loss of each transition
    """
    r = ratio(terms)
    further = (r - 1) * terms.advantage > 0
    stopped = further & outside_divergence(terms, objective)
    return -torch.where(stopped, r.detach(), r) * terms.advantage


def outside_clip_range(terms: Terms, objective: Objective) -> Tensor:
    """Whether each transition's ratio is outside the clip range.  returns bool [B]

    The direction of the update does not matter.
    """
    return (ratio(terms) - 1).abs() > objective.clip_range


def outside_normalised(terms: Terms, objective: Objective) -> Tensor:
    """Whether GRPO-Guard's ratio is outside the clip range.  returns bool [B]"""
    return (normalised_ratio(terms) - 1).abs() > objective.clip_range


def outside_divergence(terms: Terms, objective: Objective) -> Tensor:
    """Whether the KL divergence from the old policy is above max_kl.  returns bool [B]"""
    return gaussian_kl(terms.mean, terms.old_mean, terms.std) > objective.max_kl


def ratio(terms: Terms) -> Tensor:
    """exp(log_prob - old_log_prob).  returns [B]"""
    return (terms.log_prob - terms.old_log_prob).exp()


def normalised_ratio(terms: Terms) -> Tensor:
    """GRPO-Guard's ratio exp[(log_prob - old_log_prob + b) std], b the KL divergence.

    arXiv 2510.22319, eq. 8. For x_next = old_mean + std e the ratio is exp of the mean of
    e (mean - old_mean), which is centred for every std; for Gaussian log-probabilities only.

    returns [B]
    """
    bias = gaussian_kl(terms.mean, terms.old_mean, terms.std)
    return ((terms.log_prob - terms.old_log_prob + bias) * terms.std.reshape(-1)).exp()


def _clipped(r: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """-min(r A, clip(r) A).  r, advantage: [B];  returns [B]"""
    return -torch.minimum(r * advantage, r.clamp(1 - clip_range, 1 + clip_range) * advantage)


def step_weights(
    kind: str,
    grid: Tensor,
    steps: Sequence[int],
    eta: float,
    sampler: Sampler,
) -> Tensor:
    """Weight of each step's loss, of mean 1 over `steps`, the steps that may be trained.

    equal: 1.
    gradient: the inverse of the policy gradient's size with respect to v, which is sqrt(dt) / eta *
      (1 + eta^2 (1 - t) / (2 t)) for DanceGRPO's step (LongCat-Video, arXiv 2510.22200, section on
      GRPO); computed for any sampler from a draw one std away from the mean.
    noise: proportional to the step's std (TempFlow-GRPO, arXiv 2508.04324, noise-aware weighting).

    grid: float32 [T + 1];  returns float32 [T], 0 for other steps
    """
    index = torch.tensor(list(steps), device=grid.device)
    weights = torch.zeros(len(grid) - 1, device=grid.device)
    raw = torch.ones(len(index), device=grid.device)
    if kind != "equal":
        x = torch.zeros(len(index), 1, device=grid.device)
        with torch.enable_grad():
            v = torch.zeros_like(x).requires_grad_()
            t, t_next = grid[index], grid[index + 1]
            mean, std = sampler.transition(x, v, t=t, t_next=t_next, eta=eta)
            log_prob = sampler.log_prob((mean + std).detach(), mean, std)
            (slope,) = torch.autograd.grad(log_prob.sum(), v)
        raw = (1 / slope.abs() if kind == "gradient" else std.expand_as(x)).flatten()
    weights[index] = raw / raw.mean()
    return weights


@dataclass(frozen=True, kw_only=True)
class Noised:
    """B samples noised again, and two policies' predictions; float32, only v has a gradient."""

    x: Tensor  # [B, ...]: (1 - t) x_0 + t e
    x_0: Tensor  # [B, ...]: the samples
    t: Tensor  # [B]
    v: Tensor  # [B, ...]: the trained policy's velocity at x
    v_old: Tensor  # [B, ...]: the velocity of the policy that drew the samples
    advantage: Tensor  # [B]


def nft(noised: Noised, objective: Objective) -> Tensor:
    """DiffusionNFT's contrast of an implicit positive and an implicit negative policy.

    Zheng et al., arXiv 2509.16117, the training loss with its adaptive weighting:
    v+- = v_old +- beta (v - v_old), x_0+- = x - t v+-, and per sample
    A_max / beta [q |x_0+ - x_0|^2 / w+ + (1 - q) |x_0- - x_0|^2 / w-].

    |.|^2 is the mean over dimensions, q the advantage clamped to +-A_max and mapped to [0, 1], w+-
    the mean of |x_0+- - x_0| without gradient, A_max objective.advantage_clip.

    returns [B], the loss of each sample
    """
    beta, most = objective.nft_beta, objective.advantage_clip
    q = noised.advantage.clamp(-most, most) / (2 * most) + 0.5
    change = beta * (noised.v - noised.v_old)
    t = column(noised.t, noised.x)
    positive = _reconstruction(noised.x - t * (noised.v_old + change), noised.x_0)
    negative = _reconstruction(noised.x - t * (noised.v_old - change), noised.x_0)
    return most / beta * (q * positive + (1 - q) * negative)


@dataclass(frozen=True, kw_only=True)
class Matched:
    """B samples noised again, scored by `matching_log_prob`; float32."""

    log_prob: Tensor  # [B]: the trained policy's
    old_log_prob: Tensor  # [B]: the old policy's at the same times and noise, without gradient
    advantage: Tensor  # [B]


def matching_error(x: Tensor, x_0: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Mean squared error of a velocity against e - x_0, where x = (1 - t) x_0 + t e.

    x, x_0, v: [B, ...] float32;  t: [B], above 0;  returns [B]
    """
    target = (x - x_0) / column(t, x)
    return (v - target).square().flatten(1).mean(1)


def matching_log_prob(error: Tensor, t: Tensor, weighting: str) -> Tensor:
    """AWM's log-probability of a sample: -g of the matching error l at time t.

    uniform: l;  t: t l;  t2: t^2 l;  huber: t (sqrt(l + 1e-10) - 1e-5);
    ghuber: t / p ((l + 1e-10)^p - 1e-10^p) with p = 1/4.
    The last two bound the pull of a sample that is matched badly. Advantage-weighted
    matching, arXiv 2509.25050, and the forms in which others have tried it.

    error, t: [B];  returns [B]
    """
    small, power = 1e-10, 0.25
    if weighting == "uniform":
        return -error
    if weighting == "huber":
        return -t * ((error + small).sqrt() - math.sqrt(small))
    if weighting == "ghuber":
        return -t / power * ((error + small) ** power - small**power)
    return -(t ** {"t": 1, "t2": 2}[weighting]) * error


def awm(matched: Matched, objective: Objective) -> Tensor:
    """AWM: -min(r A, clip(r, 1 - c, 1 + c) A) with r = exp(log_prob - old_log_prob).

    arXiv 2509.25050, with log-probabilities by `matching_log_prob` and c objective.clip_range, of
    order 1e-5.  returns [B], the loss of each sample
    """
    r = (matched.log_prob - matched.old_log_prob).exp()
    return _clipped(r, matched.advantage, objective.clip_range)


def outside_matched(matched: Matched, objective: Objective) -> Tensor:
    """Whether AWM's ratio is outside the clip range.  returns bool [B]"""
    r = (matched.log_prob - matched.old_log_prob).exp()
    return (r - 1).abs() > objective.clip_range


@dataclass(frozen=True, kw_only=True)
class Preferred:
    """B pairs of samples noised by one noise at one time; float32."""

    better: Tensor  # [B]: squared error of the better sample's velocity, less the initial policy's
    worse: Tensor  # [B]: the same of the worse sample
    t: Tensor  # [B]


def dpo(pairs: Preferred, objective: Objective) -> Tensor:
    """Diffusion-DPO for flows: -log sigmoid(-(beta_t / 2) (d_better - d_worse)).

    Wallace et al., arXiv 2311.12908; Flow-DPO, arXiv 2501.13918. d is |v - u|^2 less that of the
    initial policy, u = e - x_0, and |.|^2 the mean over dimensions. beta_t is beta, or beta
    (1 - t)^2: the error of the noise that v implies is 1 - t times that of v. For sums over D
    dimensions, or in a derivation that sums over T steps, beta is that of here over D, over T.

    returns [B], the loss of each pair
    """
    beta = objective.dpo_beta * torch.ones_like(pairs.t)
    if objective.dpo_weighting == "noise":
        beta = beta * (1 - pairs.t) ** 2
    return softplus(beta / 2 * (pairs.better - pairs.worse))


def _reconstruction(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Mean squared error over the mean absolute error, the latter without gradient.

    estimate, x_0: [B, ...];  returns [B]
    """
    error = (estimate - x_0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)
