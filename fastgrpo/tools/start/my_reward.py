"""A reward of your own: change `__call__`, then try it with

    fastgrpo check-reward ./my_reward.py

The recipe beside this file watches it with weight 0; with a weight above 0 it is trained on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.reward import Reward, Scores

PARTS = ("brightness",)


class Brightness(Reward):
    """How bright a clip is, from 0 (black) to 1 (white)."""

    names = PARTS
    reads_prompts = False  # True where the score depends on `prompts`

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Score B clips, each by itself.

        pixels: uint8 [B, F, H, W, 3], an image is F = 1;  prompts: B texts;  fps: frames per second
        A clip that cannot be scored is NaN and not valid; never give it a number instead.
        """
        values = pixels.float().mean((1, 2, 3, 4)) / 255
        return Scores({"brightness": values}, torch.isfinite(values))


def load(spec: RewardSpec) -> Reward:
    """The reward.  spec: its block of the recipe; `spec.path` and `spec.options` are yours to use"""
    return Brightness()
