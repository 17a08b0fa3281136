"""A picture as HPSv3's patches.

Every picture, small or large, is brought to about 448 x 448 pixels: the reference gives the same
number as the fewest and the most. The resize is Pillow's bicubic on whole grey levels, as in the
reference's vision_process, and a still picture fills both frames of a patch.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.networks.qwen2_vl import patches
from fastgrpo.rewards.networks.qwen2_vl.patches import TUBE, UNIT, View

PIXELS = 256 * UNIT**2
"""About how many pixels of a picture the network sees: 448 x 448."""


def view(picture: Tensor) -> View:
    """Resize and cut a picture, uint8 [H, W, 3].  returns patches, float32 [P, 1176]

    Raises ValueError for a picture over 200 times longer than wide.
    """
    height, width = patches.frame_size(picture.shape[0], picture.shape[1], PIXELS, PIXELS)
    image = Image.fromarray(picture.numpy())
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    frame = torch.from_numpy(resized).permute(2, 0, 1).float()
    return patches.cut(frame.expand(TUBE, -1, -1, -1))
