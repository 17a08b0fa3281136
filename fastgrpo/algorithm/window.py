"""Which steps of the sampler are noisy, and what is left of the time grid after them.

DanceGRPO draws every step but the last from the SDE. With a window only w consecutive steps are noisy; the others
follow the ODE and are never trained (MixGRPO, arXiv 2507.21802, section 3; Flow-GRPO-Fast). A sample's group shares all
steps up to the first noisy one, and the steps after the window can be made longer.
"""

from torch import Tensor

from fastgrpo.algorithm import noise
from fastgrpo.core.config import Rollout


def noisy_steps(settings: Rollout, iteration: int, seed: int) -> range:
    """The steps with noise in an iteration; at most 0 .. T - 2, since the last step is deterministic."""
    last = settings.steps - 1
    if settings.window is None:
        return range(last)
    places = last - settings.window + 1
    start = 0
    if settings.window_schedule == "random":
        start = noise.permutation(places, ("window", seed, iteration))[0]
    elif settings.window_schedule == "progressive":  # from high noise to low, then again
        start = iteration // settings.window_every * settings.window_stride % places
    return range(start, start + settings.window)


def shortened(grid: Tensor, noisy: range, tail_steps: int | None) -> Tensor:
    """The grid with at most `tail_steps` steps after the noisy ones, on times of the given grid.

    grid: [T + 1] from 1 to 0;  returns [S + 1] from 1 to 0, S <= T; the noisy steps keep their numbers
    """
    steps, end = len(grid) - 1, noisy.stop
    if tail_steps is None or steps - end <= tail_steps:
        return grid
    kept = [*range(end), *(end + round(n * (steps - end) / tail_steps) for n in range(tail_steps + 1))]
    return grid[kept]
