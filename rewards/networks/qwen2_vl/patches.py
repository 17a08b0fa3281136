"""Frames as Qwen2-VL's patches: the sizes that they are resized to, and the order of the patches."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

# pixels of a patch's side, patches of a token's side, frames of a patch
PATCH, MERGE, TUBE = 14, 2, 2
UNIT = PATCH * MERGE  # both sides of a frame are multiples of a token's side
MOST_RATIO = 200  # of a frame's sides
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class View:
    """A clip or a picture as the network takes it."""

    patches: Tensor  # float32 [T * H * W, 3 * 2 * 14 * 14]
    grid: tuple[int, int, int]  # (T, H, W) in patches; a patch is two frames deep

    @property
    def tokens(self) -> int:
        """Tokens of the language model: one for 2 x 2 patches."""
        return math.prod(self.grid) // MERGE**2


def frame_size(height: int, width: int, least_pixels: int, most_pixels: int) -> tuple[int, int]:
    """(height, width) that frames are resized to, pixels.

    Both are multiples of 28, near the same shape and within the limits of least_pixels and
    most_pixels, as far as these allow it.
    Raises ValueError where one side is over 200 times the other.
    """
    if max(height, width) > MOST_RATIO * min(height, width):
        raise ValueError(
            f"pixels: {height} x {width} is over {MOST_RATIO} times longer than wide; crop the clip"
        )
    new = [max(round(side / UNIT), 1) * UNIT for side in (height, width)]
    if math.prod(new) > most_pixels:
        shrink = math.sqrt(height * width / most_pixels)
        new = [math.floor(side / shrink / UNIT) * UNIT for side in (height, width)]
    elif math.prod(new) < least_pixels:
        enlarge = math.sqrt(least_pixels / (height * width))
        new = [math.ceil(side * enlarge / UNIT) * UNIT for side in (height, width)]
    if 0 in new:
        raise ValueError(
            f"pixels: {height} x {width} is too slim to fit into {most_pixels} pixels; crop the "
            "clip"
        )
    return new[0], new[1]


def cut(frames: Tensor) -> View:
    """Patches of an even number of frames whose sides are multiples of 28.

    frames: float32 [F, 3, H, W] in whole grey levels, 0 to 255.  returns patches, float32 [P, 1176]
    """
    normal = (frames / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patches = rearrange(
        normal,
        "(t tube) c (h mh p) (w mw q) -> (t h w mh mw) (c tube p q)",
        tube=TUBE,
        mh=MERGE,
        mw=MERGE,
        p=PATCH,
        q=PATCH,
    )
    height, width = frames.shape[-2:]
    return View(patches, (len(frames) // TUBE, height // PATCH, width // PATCH))
