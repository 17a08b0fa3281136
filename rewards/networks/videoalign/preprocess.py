"""A clip as VideoAlign's patches: which frames, in which size, in which order.

Follows the VideoAlign repository's vision_process.py (a variant of qwen-vl-utils) and the image
processor of Qwen2-VL in transformers 4.45.2, which it pins: bit for bit the same numbers, without
torchvision and without a processor.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastgrpo.rewards.networks.videoalign.sampling import LEAST_FRAMES, sampled

# pixels of a patch's side, patches of a token's side, frames of a patch
PATCH, MERGE, TUBE = 14, 2, 2
UNIT = PATCH * MERGE  # both sides of a frame are multiples of a token's side
LEAST_PIXELS = 128 * UNIT**2  # smaller frames are enlarged
MOST_RATIO = 200  # of a frame's sides
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class View:
    """A clip as the network takes it."""

    patches: Tensor  # float32 [T * H * W, 3 * 2 * 14 * 14]
    grid: tuple[int, int, int]  # (T, H, W) in patches; a patch is two frames deep

    @property
    def tokens(self) -> int:
        """Tokens of the language model: one for 2 x 2 patches."""
        return math.prod(self.grid) // MERGE**2


def frame_indices(frames: int, fps: float, wanted_fps: float) -> list[int]:
    """Indices of the sampled ones among `frames` frames, about wanted_fps per second.

    fps: frames of the clip per second
    Raises ValueError for a single frame, which shows no motion.
    """
    if frames < LEAST_FRAMES:
        raise ValueError(
            f"pixels: {frames} frame; VideoAlign judges motion, give at least {LEAST_FRAMES}"
        )
    count = sampled(frames, fps, wanted_fps)
    return [int(i) for i in torch.linspace(0, frames - 1, count).round().tolist()]


def frame_size(height: int, width: int, most_pixels: int) -> tuple[int, int]:
    """(height, width) that frames are resized to, pixels.

    Both are multiples of 28, near the same shape and within the limits of LEAST_PIXELS and
    most_pixels.
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
    elif math.prod(new) < LEAST_PIXELS:
        enlarge = math.sqrt(LEAST_PIXELS / (height * width))
        new = [math.ceil(side * enlarge / UNIT) * UNIT for side in (height, width)]
    if 0 in new:
        raise ValueError(
            f"pixels: {height} x {width} is too slim to fit into {most_pixels} pixels; crop the "
            "clip"
        )
    return new[0], new[1]


def view(clip: Tensor, fps: float, wanted_fps: float, most_pixels: int) -> View:
    """Sample, resize and cut a clip.

    clip: uint8 [F, H, W, 3], at fps frames per second.  returns patches, float32 [P, 1176]
    The resize rounds back to whole grey levels, as torchvision's does on uint8.
    Raises ValueError for a clip that VideoAlign cannot judge.
    """
    frames = clip[frame_indices(len(clip), fps, wanted_fps)].permute(0, 3, 1, 2).float()
    size = frame_size(clip.shape[1], clip.shape[2], most_pixels)
    frames = F.interpolate(frames, size, mode="bicubic", antialias=True).round().clamp(0, 255)
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
    return View(patches, (len(frames) // TUBE, size[0] // PATCH, size[1] // PATCH))
