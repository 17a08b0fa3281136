"""The noisy steps of an iteration, and the time grid after them.

DanceGRPO draws every step but the last from the SDE. With a window only w consecutive steps are
noisy; the others follow the ODE and are never trained (MixGRPO, arXiv 2507.21802, section 3;
Flow-GRPO-Fast). A sample's group shares all steps up to the first noisy one, and the steps after
the window can be made longer.
"""

from torch import Tensor

from fastgrpo.algorithm import noise
from fastgrpo.core.config import Rollout
from fastgrpo.core.config.window import noisy_count, window_start, window_starts


def noisy_steps(settings: Rollout, iteration: int, seed: int) -> range:
    """The steps with noise in an iteration, at most 0 .. T - 2: the last step is deterministic."""
    start = window_start(settings, iteration)
    if start is None:
        starts = window_starts(settings)
        start = starts[noise.permutation(len(starts), ("window", seed, iteration))[0]]
    return range(start, start + noisy_count(settings))


def shortened(grid: Tensor, noisy: range, tail_steps: int | None) -> Tensor:
    """The grid with at most `tail_steps` steps after the noisy ones, on times of the given grid.

    grid: float32 [T + 1] from 1 to 0
    returns float32 [S + 1] from 1 to 0, S <= T; the noisy steps keep their numbers
    """
    steps, end = len(grid) - 1, noisy.stop
    if tail_steps is None or steps - end <= tail_steps:
        return grid
    tail = [end + round(n * (steps - end) / tail_steps) for n in range(tail_steps + 1)]
    return grid[[*range(end), *tail]]
