"""The samples and steps that an iteration trains, by optimizer step. Pure functions."""

import torch
from torch import Tensor

from fastgrpo.algorithm import noise


def best_of_n(advantages: Tensor, valid: Tensor, group_size: int, keep: int) -> Tensor:
    """The best keep / 2 and the worst keep / 2 valid samples of each prompt.

    DanceGRPO, section 4.3.
    Advantages keep the statistics of the whole group. A group with fewer than `keep` valid samples
    keeps them all.

    advantages: float32 [N];  valid: bool [N];  returns bool [N]
    """
    selected = torch.zeros_like(valid)
    for start in range(0, len(advantages), group_size):
        members = [i for i in range(start, start + group_size) if valid[i]]
        order = sorted(members, key=lambda i: (float(advantages[i]), i))
        half = keep // 2
        chosen = order if len(order) <= keep else order[:half] + order[-half:]
        selected[chosen] = True
    return selected


def pairs(advantages: Tensor, selected: Tensor, group_size: int) -> list[tuple[int, int]]:
    """Pairs of each prompt's selected samples, (better, worse), which prefer by advantage.

    The best with the worst, the second best with the second worst, and so on. Pairs of equal
    advantages are left out, as in a group whose rewards are equal: nothing is preferred there.

    advantages: float32 [N];  selected: bool [N]
    """
    found: list[tuple[int, int]] = []
    values, taken = advantages.tolist(), selected.tolist()
    for start in range(0, len(values), group_size):
        members = [i for i in range(start, start + group_size) if taken[i]]
        order = sorted(members, key=lambda i: (values[i], i))
        half = len(order) // 2
        for worse, better in zip(order[:half], order[::-1][:half], strict=True):
            if values[better] > values[worse]:
                found.append((better, worse))
    return found


def choose_timesteps(steps: range, count: int, choice: str, key: noise.Key) -> list[int]:
    """`count` of the noisy steps, the only ones that can be trained, in increasing order.

    choice: random (from the key), first, or last (the paper's ablations)
    """
    if choice == "first":
        return list(steps[:count])
    if choice == "last":
        return list(steps[len(steps) - count :])
    return sorted(steps[n] for n in noise.permutation(len(steps), key)[:count])


def minibatches(selected: Tensor, group_size: int, updates: int, key: noise.Key) -> list[list[int]]:
    """Deal the selected samples into `updates` minibatches with an equal share of every prompt.

    selected: bool [N];  returns each optimizer step's samples, by index in increasing order
    """
    batches: list[list[int]] = [[] for _ in range(updates)]
    trained = selected.tolist()
    for start in range(0, len(trained), group_size):
        members = [i for i in range(start, start + group_size) if trained[i]]
        # the first batch differs by group, or all leftovers of incomplete groups would fall on it
        offset = start // group_size
        # one block after another, so that ranks with part of a group have as many of each batch
        for block in range(0, len(members), updates):
            order = noise.permutation(len(members[block : block + updates]), (*key, offset, block))
            for position, member in enumerate(order):
                batches[(position + offset) % updates].append(members[block + member])
    return [sorted(batch) for batch in batches]
