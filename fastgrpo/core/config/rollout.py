"""The rollout's section, and the position of its noisy steps: arithmetic alone, which a plan does
without torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from fastgrpo.core.config.base import Positive, Rate, Section


class Rollout(Section):
    samples_per_prompt: Annotated[int, Field(ge=2)] = 12
    """Group size G: samples drawn per prompt (12 in the paper)."""
    steps: Annotated[int, Field(ge=2)] = 25
    """Denoising steps T; the last is deterministic and never trained (25 in the paper)."""
    eta: float = 0.3
    """Noise level of the SDE (0.3 in the paper); 0 would make every sample of a group the same."""
    shift: Rate | None = None
    """Time-grid shift; None: what the model folder's scheduler says."""
    shared_noise: bool = True
    """Every sample of a group starts from the same noise (the paper's choice)."""
    seeds_per_prompt: Positive = 1
    """M: initial noises of a group where shared_noise = true, each shared by samples_per_prompt / M
    samples that part at the first noisy step (TempFlow's branches)."""
    scouts: Positive | None = None
    """Candidates of each prompt that the ODE draws and the rewards score before the rollout, whose
    noises are those of the best and the worst half of them (Sol-RL). None: noises by their keys."""
    scout_steps: Annotated[int, Field(ge=2)] = 6
    """Denoising steps of a scout."""
    scout_dtype: Literal["bfloat16"] | None = None
    """Precision of a scout's matrix products; None: model.dtype."""
    sampler: Literal["dance", "flow", "linear", "precise", "cps"] = "dance"
    """The noisy steps' transition: the paper's constant noise level, Flow-GRPO's, one that falls
    linearly with the time (Flash-GRPO), SAGE-GRPO's or Flow-CPS'; see
    docs/guides/algorithms/algorithms.md."""
    window: Positive | None = None
    """Noisy steps; the others follow the ODE and are never trained (MixGRPO). None: all but the
    last."""
    window_schedule: Literal["first", "random", "progressive", "per_prompt"] = "progressive"
    """Where the window lies: at high noise, anew in each iteration, moving from high noise to low
    and again, or anew for each prompt (Flash-GRPO; window = 1)."""
    window_pool: Positive | None = None
    """window_schedule = per_prompt: the first steps, so many, that a prompt's noisy step is drawn
    from; None: all but the last."""
    window_every: Positive = 25
    """Iterations after which a progressive window moves on."""
    window_stride: Positive = 1
    """Steps by which it moves."""
    tail_steps: Positive | None = None
    """At most this many ODE steps after the window; None: as many as the grid has there."""
    store: Literal["device", "host"] = "device"
    """Where the chosen transitions wait for the update: in the device's memory, or pinned in the
    host's."""
    batch_size: Positive | Literal["auto"] = 8
    """Samples per forward pass and rank; auto = as many as the free memory has room for, measured
    before the first iteration. Changes speed and memory, and results up to rounding."""

    @property
    def at_once(self) -> int:
        """Samples per forward pass and rank, once "auto" has become a number."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def noises_per_prompt(self) -> int:
        """Different initial noises among a prompt's samples."""
        return self.seeds_per_prompt if self.shared_noise else self.samples_per_prompt

    def with_batch_size(self, size: int) -> "Rollout":
        """The section with that number of samples per forward pass."""
        return self.model_copy(update={"batch_size": size})


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
