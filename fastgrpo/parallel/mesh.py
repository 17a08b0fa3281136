"""How ranks are divided over replicas and shards: arithmetic alone, which a plan wants without importing torch."""

from fastgrpo.core.config import Distributed
from fastgrpo.core.errors import UserError


def mesh_shape(settings: Distributed, size: int, ranks_of_node: int) -> tuple[int, int]:
    """(replicas, ranks over which each is sharded) of a world of `size` ranks.

    Within a node where there are several: layer-wise gathers then stay off the slower network.
    Raises UserError where sp and shard do not divide the ranks.
    """
    sp, shard = settings.sp, settings.shard or min(ranks_of_node, size)
    fitting = [n for n in range(1, size + 1) if size % n == 0]
    if size % sp:
        raise UserError(
            f"distributed.sp={sp}: does not divide the {size} ranks; use one of {', '.join(map(str, fitting))}."
        )
    if size % shard or shard % sp:
        fitting = [n for n in fitting if n % sp == 0]
        raise UserError(
            f"distributed.shard={shard}: must divide the {size} ranks and be a multiple of sp={sp}; use one of "
            f"{', '.join(map(str, fitting))}."
        )
    return size // shard, shard
