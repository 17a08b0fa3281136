"""One exchange of values between groups of ranks that work on different samples."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.parallel.world import World


def between_groups(outgoing: Sequence[Tensor], sizes: Sequence[int], world: World) -> list[Tensor]:
    """Send values to every group of ranks, and receive theirs. All ranks must call it.

    The ranks of a group hold the same values: each sends to the rank of its own place.

    outgoing: by group, float32 [n], n = 0 for none;  sizes: by group, the n that it sends here
    returns by group, float32 [n] on the world's device
    """
    places, place = (world.sp.size, world.sp.rank) if world.sp else (1, 0)
    give, take = [0] * world.size, [0] * world.size
    for group, (values, size) in enumerate(zip(outgoing, sizes, strict=True)):
        give[group * places + place], take[group * places + place] = len(values), size
    received = torch.empty(sum(take), device=world.device)
    sent = torch.cat([values.to(world.device) for values in outgoing])
    dist.all_to_all_single(received, sent, take, give)
    return list(received.split(list(sizes)))
