"""Which samples and which steps an iteration trains, and in which optimizer step. Pure functions."""

import torch
from torch import Tensor

from fastgrpo.algorithm import noise


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


def choose_timesteps(steps: range, count: int, choice: str, key: noise.Key) -> list[int]:
    """`count` of the noisy steps, the only ones that can be trained, in increasing order.

    choice: random (from the key), first, or last (the paper's ablations)
    """
    if choice == "first":
        return list(steps[:count])
    if choice == "last":
        return list(steps[len(steps) - count :])
    return sorted(steps[n] for n in noise.permutation(len(steps), key)[:count])


def minibatches(kept: Tensor, group_size: int, updates: int, key: noise.Key) -> list[list[int]]:
    """Deal the kept samples into `updates` minibatches, each with an equal share of every prompt.

    kept: bool [N];  returns for each optimizer step the indices of its samples, in increasing order
    """
    batches: list[list[int]] = [[] for _ in range(updates)]
    trained = kept.tolist()
    for start in range(0, len(trained), group_size):
        members = [i for i in range(start, start + group_size) if trained[i]]
        offset = start // group_size  # so that leftovers of incomplete groups do not all fall on the first batch
        for block in range(
            0, len(members), updates
        ):  # one to each batch, so that ranks with part of a group have as many
            order = noise.permutation(len(members[block : block + updates]), (*key, offset, block))
            for place, member in enumerate(order):
                batches[(place + offset) % updates].append(members[block + member])
    return [sorted(batch) for batch in batches]
