"""The position of the window of noisy steps: arithmetic alone, which a plan does without torch."""

from fastgrpo.core.config import Rollout


def noisy_count(settings: Rollout) -> int:
    """The number of noisy steps; without a window all but the last, which is deterministic."""
    return settings.steps - 1 if settings.window is None else settings.window


def window_starts(settings: Rollout) -> range:
    """The steps at which the window can start."""
    starts = range(settings.steps - noisy_count(settings))
    return starts[: settings.window_pool] if settings.window_schedule == "per_prompt" else starts


def window_start(settings: Rollout, iteration: int) -> int | None:
    """The first noisy step of an iteration.

    None: drawn from `window_starts`, for the iteration or for each of its prompts.
    """
    if settings.window is None or settings.window_schedule == "first":
        return 0
    if settings.window_schedule in ("random", "per_prompt"):
        return None
    # progressive: from high noise to low, then again
    moved = iteration // settings.window_every * settings.window_stride
    return moved % len(window_starts(settings))
