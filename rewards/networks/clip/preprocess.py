"""Frames to a CLIP's input, exactly as each reference makes it; without torchvision.

letterbox  HPS: the longest side to `size` on float pixels, the rest black. HPSv2's validation
           transform (`light_augmentation`) turns pixels to float before it resizes, so nothing is
           rounded or clamped. torchvision resized without antialiasing before 0.17 and with it
           since; `antialias` says which.
shortest   CLIP: Pillow's bicubic on uint8, the shortest side to `size`, then a centre crop.
           open_clip (torchvision) rounds an odd crop's offset half to even, transformers rounds it
           down: `crop` says which.
squash     DFN's entry in open_clip: Pillow's bicubic on uint8 to `size` x `size`, whatever the
           sides were.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Rule that makes a network's input of frames; part of a reward's fingerprint."""

    size: int
    """Side of the square input, pixels."""
    resize: Literal["letterbox", "shortest", "squash"]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    antialias: bool = True
    """Whether letterbox antialiases; Pillow always does."""
    crop: Literal["half_even", "down"] = "half_even"
    """Rounding of the crop's offset, for shortest."""

    def __call__(self, frames: Tensor) -> Tensor:
        """The network's input, float32 [N, 3, size, size], normalised, on the CPU.

        frames: uint8 [N, H, W, 3]
        """
        frames = frames.cpu()
        if self.resize == "letterbox":
            square = letterbox(frames, self.size, self.antialias)
        else:
            resized = [self._pillow(frame) for frame in frames]
            square = rearrange(torch.stack(resized), "n h w c -> n c h w").float().div(255)
        return self._normalised(square)

    def differentiable(self, frames: Tensor) -> Tensor:
        """The same with the gradient, [N, 3, size, size], on the frames' device.

        frames: float32 [N, H, W, 3], 0 to 255. What Pillow rounds to whole numbers after resizing is not rounded.
        """
        if self.resize == "letterbox":
            return self._normalised(letterbox(frames, self.size, self.antialias))
        images = rearrange(frames, "n h w c -> n c h w").div(255)
        sides = self._sides(*images.shape[-2:])
        images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (self._offset(side) for side in sides)
        return self._normalised(images[..., top : top + self.size, left : left + self.size])

    def _normalised(self, square: Tensor) -> Tensor:
        """Images [N, 3, size, size], 0 to 1, by mean and standard deviation of each channel."""
        both = torch.tensor([self.mean, self.std], device=square.device)
        mean, std = both.reshape(2, 1, 3, 1, 1)
        return (square - mean) / std

    def _pillow(self, frame: Tensor) -> Tensor:
        """A frame, uint8 [H, W, 3], as uint8 [size, size, 3]."""
        frame = bicubic(frame, *self._sides(*frame.shape[:2]))
        top, left = (self._offset(side) for side in frame.shape[:2])
        return frame[top : top + self.size, left : left + self.size]

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a frame before the centre crop, for shortest and squash."""
        if self.resize == "squash":
            return self.size, self.size
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _offset(self, side: int) -> int:
        """First row or column of the centre crop of a side, pixels."""
        return (side - self.size) // 2 if self.crop == "down" else round((side - self.size) / 2)


def letterbox(frames: Tensor, size: int, antialias: bool) -> Tensor:
    """The longest side to `size`, the rest black on both sides.

    frames: uint8 or float32 [N, H, W, 3], 0 to 255.
    returns float32 [N, 3, size, size], about 0 to 1: bicubic overshoots are kept
    """
    images = rearrange(frames, "n h w c -> n c h w").float().div(255)
    scale = size / max(images.shape[-2:])
    height, width = (max(round(side * scale), 1) for side in images.shape[-2:])
    if scale != 1:
        images = F.interpolate(
            images, (height, width), mode="bicubic", align_corners=False, antialias=antialias
        )
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def bicubic(frame: Tensor, height: int, width: int) -> Tensor:
    """A frame resized by Pillow's antialiased bicubic, as in torchvision and transformers.

    frame: uint8 [H, W, 3].  returns uint8 [height, width, 3]
    """
    resized = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))
