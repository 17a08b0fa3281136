"""How many samples go through the network at once where a recipe leaves it to the memory:
rollout.batch_size = "auto".

For what a run measures (fastgrpo/tools/preflight/largest_batch.py) and for what the planner
computes.
"""

import math

SHARE = 0.8  # of the free memory: allocators leave gaps, and later prompts may be longer


def fitting(free: float, first: float, further: float) -> int:
    """Samples that fit into `free` bytes; at least 1.

    first, further: bytes that one sample takes, and that each more adds
    """
    room = SHARE * free - first
    if further <= 0.0:
        return 1 if room < 0.0 else 2**31
    return max(1, 1 + math.floor(room / further))


def balanced(samples: int, fit: int) -> int:
    """The smallest batch that needs no more batches for `samples` than batches of `fit`."""
    return math.ceil(samples / math.ceil(samples / fit))
