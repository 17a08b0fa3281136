"""The form that clips have."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check(pixels: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError where pixels and prompts are not B clips and one prompt for each.

    pixels: uint8 [B, F, H, W, 3];  prompts: B texts
    """
    form = f"{pixels.dtype} {list(pixels.shape)}"
    if (
        pixels.dtype != torch.uint8
        or pixels.ndim != 5
        or pixels.shape[-1] != 3
        or 0 in pixels.shape
    ):
        raise ValueError(
            f"pixels={form}: expected torch.uint8 [B, F, H, W, 3]; convert the clips first"
        )
    if len(prompts) != len(pixels):
        raise ValueError(
            f"prompts={len(prompts)}: there are {len(pixels)} clips; give one prompt for each"
        )
