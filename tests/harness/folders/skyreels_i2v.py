"""A tiny random SkyReels-V1 in one folder: HunyuanVideo's other parts and a network of twice the
input channels.
"""

from pathlib import Path

import torch
from diffusers import HunyuanSkyreelsImageToVideoPipeline

from tests.harness.folders import hunyuan_video


def write(folder: Path) -> None:
    """Random weights, the same on every call.

    `folder`/transformer is what Skywork/SkyReels-V1-Hunyuan-I2V holds.
    """
    parts = hunyuan_video.pipeline().components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts["transformer"] = hunyuan_video.network(2 * hunyuan_video.CHANNELS)
    HunyuanSkyreelsImageToVideoPipeline(**parts).save_pretrained(folder)
