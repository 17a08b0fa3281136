"""Group relative policy optimisation: advantages, Best-of-N, the choice of timesteps, the objective. Pure functions.

N = prompts x group_size samples in prompt order, so that sample i belongs to group i // group_size.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from fastgrpo import noise


def group_advantages(rewards: Tensor, group_size: int, valid: Tensor | None = None, min_spread: float = 1e-6) -> Tensor:
    """(r - mean) / std within each prompt's group (DanceGRPO eq. 7), over the valid samples alone.

    rewards: float [N];  valid: bool [N], by default where rewards are finite
    returns float32 [N]; 0 for invalid samples and for groups with fewer than two valid ones or a std below min_spread
    """
    valid = torch.isfinite(rewards) if valid is None else valid & torch.isfinite(rewards)
    mask = rearrange(valid, "(n g) -> n g", g=group_size)
    r = rearrange(rewards.double(), "(n g) -> n g", g=group_size).masked_fill(~mask, 0.0)
    count = mask.sum(1, keepdim=True)
    centred = (r - r.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~mask, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    teaches = (count >= 2) & (std >= min_spread)
    advantages = torch.where(teaches, centred / std.clamp(min=min_spread), 0.0)
    return rearrange(advantages, "n g -> (n g)").float()


def combined_advantages(
    scores: Mapping[str, Tensor],
    valid: Tensor,
    weights: Mapping[str, float],
    group_size: int,
    clip: float,
    min_spread: float,
) -> Tensor:
    """Advantages summed over rewards, not rewards summed: their scales differ (DanceGRPO section 3.3).

    scores: part -> float [N];  valid: bool [N]
    returns float32 [N], clamped to +-clip
    """
    total = torch.zeros(len(valid))
    for part, weight in weights.items():
        if weight:
            total += weight * group_advantages(scores[part], group_size, valid, min_spread)
    return total.clamp(-clip, clip)


def best_of_n(advantages: Tensor, valid: Tensor, group_size: int, keep: int) -> Tensor:
    """The best keep / 2 and the worst keep / 2 valid samples of each prompt (DanceGRPO section 4.3).

    Advantages keep the statistics of the whole group. A group with fewer than `keep` valid samples keeps them all.
    returns bool [N]
    """
    kept = torch.zeros_like(valid)
    for start in range(0, len(advantages), group_size):
        members = [i for i in range(start, start + group_size) if valid[i]]
        order = sorted(members, key=lambda i: (float(advantages[i]), i))
        half = keep // 2
        chosen = order if len(order) <= keep else order[:half] + order[-half:]
        kept[chosen] = True
    return kept


def choose_timesteps(num_steps: int, count: int, choice: str, key: noise.Key) -> list[int]:
    """`count` of the trainable steps 0 .. num_steps - 2 (the last step is deterministic), in increasing order.

    choice: random (from the key), first, or last (the paper's ablations)
    """
    if choice == "first":
        return list(range(count))
    if choice == "last":
        return list(range(num_steps - 1 - count, num_steps - 1))
    return sorted(noise.permutation(num_steps - 1, key)[:count])


def clipped_objective(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = exp(log_prob - old_log_prob) (DanceGRPO eq. 6).

    All [B] float32; the loss to descend, one per transition.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def minibatches(kept: Tensor, group_size: int, updates: int, key: noise.Key) -> list[list[int]]:
    """Deal the kept samples into `updates` minibatches, each with an equal share of every prompt.

    kept: bool [N];  returns for each optimizer step the indices of its samples, in increasing order
    """
    batches: list[list[int]] = [[] for _ in range(updates)]
    for start in range(0, len(kept), group_size):
        members = [i for i in range(start, start + group_size) if kept[i]]
        offset = start // group_size  # so that leftovers of incomplete groups do not all fall on the first batch
        for block in range(
            0, len(members), updates
        ):  # one to each batch, so that ranks with part of a group have as many
            order = noise.permutation(len(members[block : block + updates]), (*key, offset, block))
            for place, member in enumerate(order):
                batches[(place + offset) % updates].append(members[block + member])
    return [sorted(batch) for batch in batches]
