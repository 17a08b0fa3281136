"""The division of ranks, and of work over them: arithmetic alone, without torch."""

from fastgrpo.core.config import Distributed
from fastgrpo.core.errors import UserError


def contiguous_part(total: int, parts: int, index: int) -> range:
    """The part of range(total) that falls to one of `parts`; their sizes differ by at most 1."""
    return range(index * total // parts, (index + 1) * total // parts)


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def mesh_shape(settings: Distributed, size: int, ranks_of_node: int) -> tuple[int, int]:
    """(replicas, ranks over which each replica is sharded) of a world of `size` ranks.

    By default a replica lies within a node: layer-wise gathers then stay off the slower network.
    Raises UserError where sp and shard do not divide the ranks.
    """
    sp, asked = settings.sp, settings.shard
    shard = size if asked == "all" else asked or min(ranks_of_node, size)
    fitting = divisors(size)
    if size % sp:
        raise UserError(
            f"distributed.sp={sp}: does not divide the {size} ranks; "
            f"use one of {', '.join(map(str, fitting))}."
        )
    if size % shard or shard % sp:
        sizes = ", ".join(str(n) for n in fitting if n % sp == 0)
        raise UserError(
            f"distributed.shard={shard}: must divide the {size} ranks and be a multiple of "
            f"sp={sp}; use one of {sizes}."
        )
    return size // shard, shard
