"""Which frames of a clip an image reward looks at, and the form that clips have."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rule = str | int
"""As `RewardSpec.frames`: "all", "first", "middle", or a number of evenly spaced frames."""


def choose(rule: Rule, total: int) -> list[int]:
    """Indices of the chosen ones among `total` frames, in order, each once.

    A number n takes the middles of n equal shares of the clip, floor((2 i + 1) total / 2 n), so that the first frame,
    which is the easiest to please with, has no special place; where the clip is shorter, all of its frames.
    """
    if rule == "all":
        return list(range(total))
    if rule == "first":
        return [0]
    if rule == "middle":
        return [total // 2]
    wanted = min(int(rule), total)
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def check(pixels: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError where pixels are not uint8 [B, F, H, W, 3] with one prompt for each of the B clips."""
    form = f"{pixels.dtype} {list(pixels.shape)}"
    if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels={form}: expected torch.uint8 [B, F, H, W, 3]; convert the clips first")
    if len(prompts) != len(pixels):
        raise ValueError(f"prompts={len(prompts)}: there are {len(pixels)} clips; give one prompt for each")
