"""Advantages of group relative policy optimisation, one per sample. Pure functions.

N = prompts x group_size samples in prompt order, so that sample i belongs to group i // group_size.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from fastgrpo.core.config import Objective


def group_advantages(
    rewards: Tensor,
    group_size: int,
    valid: Tensor | None = None,
    min_spread: float = 1e-6,
) -> Tensor:
    """(r - mean) / std within each prompt's group (DanceGRPO eq. 7), over the valid samples alone.

    rewards: float [N];  valid: bool [N], by default where rewards are finite
    returns float32 [N]; 0 for invalid samples, and for groups with fewer than two valid samples or
      with a std below min_spread
    """
    centred, std, usable = _group_statistics(rewards, group_size, valid, min_spread)
    return _flat(torch.where(usable, centred / std.clamp(min=min_spread), 0.0))


def largest_std_advantages(
    rewards: Tensor, group_size: int, valid: Tensor | None = None, min_spread: float = 1e-6
) -> Tensor:
    """(r - the group's mean) / the largest group's std.

    LongCat-Video, arXiv 2510.22200, section on GRPO. A group whose samples hardly differ keeps a
    small advantage, where division by its own std would amplify the reward's noise.

    rewards, valid: [N], as for `group_advantages`;  returns float32 [N], 0 where that has 0
    """
    centred, std, usable = _group_statistics(rewards, group_size, valid, min_spread)
    largest = torch.where(usable, std, 0.0).max()
    return _flat(torch.where(usable, centred / largest.clamp(min=min_spread), 0.0))


def _group_statistics(
    rewards: Tensor, group_size: int, valid: Tensor | None, min_spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of each group's valid samples, in float64.

    rewards: float [N];  valid: bool [N]
    returns r - mean [n, g], 0 where invalid; std [n, 1]; whether the group's rewards differ enough
      to give advantages, bool [n, 1]
    """
    valid = torch.isfinite(rewards) if valid is None else valid & torch.isfinite(rewards)
    mask = rearrange(valid, "(n g) -> n g", g=group_size)
    r = rearrange(rewards.double(), "(n g) -> n g", g=group_size).masked_fill(~mask, 0.0)
    count = mask.sum(1, keepdim=True)
    centred = (r - r.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~mask, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred, std, (count >= 2) & (std >= min_spread)


def _flat(grouped: Tensor) -> Tensor:
    """[n, g] to float32 [N]."""
    return rearrange(grouped, "n g -> (n g)").float()


def combined_advantages(
    scores: Mapping[str, Tensor],
    valid: Tensor,
    weights: Mapping[str, float],
    group_size: int,
    objective: Objective,
) -> Tensor:
    """One advantage per sample from all rewards, by objective.normalise.

    group: advantages summed over rewards; the rewards' scales differ, so their sum would not do
      (DanceGRPO, section 3.3).
    batch: the sum of "group", scaled to mean 0 and std 1 over the samples of groups with non-zero
      advantages; then the size of the update does not depend on the number of rewards (GDPO, arXiv
      2601.05242).
    largest_std: the sum over rewards of `largest_std_advantages`.
    global: rewards summed, then scaled to mean 0 and std 1 over the samples of all prompts (DDPO,
      arXiv 2305.13301).

    scores: part -> float [N];  valid: bool [N]
    returns float32 [N], clamped to +- objective.advantage_clip; 0 for invalid samples and where the
      rewards do not differ
    """
    total = torch.zeros(len(valid))
    min_spread, normalise = objective.min_spread, objective.normalise
    for part, weight in weights.items():
        if not weight:
            continue
        if normalise == "global":
            total += weight * scores[part]
        elif normalise == "largest_std":
            total += weight * largest_std_advantages(scores[part], group_size, valid, min_spread)
        else:
            total += weight * group_advantages(scores[part], group_size, valid, min_spread)
    if normalise == "batch":
        active = rearrange(total != 0, "(n g) -> n g", g=group_size).any(1)
        active = active.repeat_interleave(group_size)
        total = group_advantages(total, len(total), valid & active, min_spread)
    elif normalise == "global":
        total = group_advantages(total, len(total), valid, min_spread)
    return total.clamp(-objective.advantage_clip, objective.advantage_clip)
