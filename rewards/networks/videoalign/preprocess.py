"""A clip as VideoAlign's patches: which frames, in which size, in which order.

Follows the VideoAlign repository's vision_process.py (a variant of qwen-vl-utils) and the image
processor of Qwen2-VL in transformers 4.45.2, which it pins: bit for bit the same numbers, without
torchvision and without a processor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.rewards.networks.qwen2_vl import patches
from fastgrpo.rewards.networks.qwen2_vl.patches import UNIT, View
from fastgrpo.rewards.networks.videoalign.sampling import LEAST_FRAMES, sampled

LEAST_PIXELS = 128 * UNIT**2  # smaller frames are enlarged


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

    Raises ValueError where one side is over 200 times the other.
    """
    return patches.frame_size(height, width, LEAST_PIXELS, most_pixels)


def view(clip: Tensor, fps: float, wanted_fps: float, most_pixels: int) -> View:
    """Sample, resize and cut a clip.

    clip: uint8 [F, H, W, 3], at fps frames per second.  returns patches, float32 [P, 1176]
    The resize rounds back to whole grey levels, as torchvision's does on uint8.
    Raises ValueError for a clip that VideoAlign cannot judge.
    """
    frames = clip[frame_indices(len(clip), fps, wanted_fps)].permute(0, 3, 1, 2).float()
    size = frame_size(clip.shape[1], clip.shape[2], most_pixels)
    frames = F.interpolate(frames, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return patches.cut(frames)
