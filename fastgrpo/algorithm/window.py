"""The noisy steps of an iteration, and the time grid after them.

DanceGRPO draws every step but the last from the SDE. With a window only w consecutive steps are
noisy; the others follow the ODE and are never trained (MixGRPO, arXiv 2507.21802, section 3;
Flow-GRPO-Fast). A sample's group shares all steps up to the first noisy one, and the steps after
the window can be made longer. Or each prompt has one noisy step of its own, from a pool of them
(Flash-GRPO, arXiv 2605.15980).
"""

from typing import TypeVar

from torch import Tensor

from fastgrpo.algorithm import noise
from fastgrpo.core.config import Rollout
from fastgrpo.core.config.rollout import noisy_count, window_start, window_starts

T = TypeVar("T")


def noisy_steps(settings: Rollout, iteration: int, seed: int) -> range:
    """The steps with noise in an iteration, at most 0 .. T - 2: the last step is deterministic.

    With a window for each prompt: the pool of them all, see `steps_of_prompts`.
    """
    if settings.window_schedule == "per_prompt":
        return window_starts(settings)
    start = window_start(settings, iteration)
    if start is None:
        starts = window_starts(settings)
        start = starts[noise.permutation(len(starts), ("window", seed, iteration))[0]]
    return range(start, start + noisy_count(settings))


def steps_of_prompts(settings: Rollout, iteration: int, seed: int, prompts: int) -> tuple[int, ...]:
    """The one noisy step of each of an iteration's prompts; empty where all have the same window.

    Each is drawn uniformly from the pool, by a key of its own.
    """
    if settings.window_schedule != "per_prompt":
        return ()
    pool = window_starts(settings)
    keys: list[noise.Key] = [("window", seed, iteration, prompt) for prompt in range(prompts)]
    return tuple(pool[noise.permutation(len(pool), key)[0]] for key in keys)


def shortened(grid: Tensor, noisy: range, tail_steps: int | None) -> Tensor:
    """The grid with at most `tail_steps` steps after the noisy ones, on times of the given grid.

    grid: float32 [T + 1] from 1 to 0
    returns float32 [S + 1] from 1 to 0, S <= T; the noisy steps keep their numbers
    """
    kept = _kept(len(grid) - 1, noisy.stop, tail_steps)
    return grid if kept is None else grid[kept]


def shortened_steps(of_steps: tuple[T, ...], noisy: range, tail_steps: int | None) -> tuple[T, ...]:
    """The same of what each step of the given grid has, by the time that it begins at.

    of_steps: [T], or empty;  returns [S], or empty
    """
    kept = _kept(len(of_steps), noisy.stop, tail_steps) if of_steps else None
    return of_steps if kept is None else tuple(of_steps[number] for number in kept[:-1])


def _kept(steps: int, end: int, tail_steps: int | None) -> list[int] | None:
    """The numbers of a grid's times that are kept, 0 .. steps; None: all.

    end: the first step behind the noisy ones
    """
    if tail_steps is None or steps - end <= tail_steps:
        return None
    tail = [end + round(n * (steps - end) / tail_steps) for n in range(tail_steps + 1)]
    return [*range(end), *tail]
