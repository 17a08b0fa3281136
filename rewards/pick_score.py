"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): which picture people would pick for this prompt. Part PickScore.

A CLIP ViT-H-14 in transformers' layout; the score is the cosine times the learned temperature, as its authors give
it. A clip's score is the mean over its frames. Each clip is scored against its own prompt.
"""

from typing import Literal

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.reward import RewardSize
from fastgrpo.rewards.common import options
from fastgrpo.rewards.common.frames import count_by
from fastgrpo.rewards.networks.clip import clip_reward

FRAMES = "all"
SIZE = RewardSize(parameters=0.99e9, tokens=257 + 77, frames_scored=count_by(FRAMES))  # of ViT-H-14: image and text

PUBLISHED = clip_reward.Published(
    part="PickScore",
    files=("model.safetensors", "pytorch_model.bin"),
    remedy="give the folder of PickScore_v1, or its hub repository yuvalkirstain/PickScore_v1",
    frames=FRAMES,
    resize="shortest",
)


class Options(Section):
    """`rewards.options` of pick_score."""

    scale: Literal["logits", "logits / 26", "cosine"] = "logits"
    """logits as its authors; logits / 26 as flow_grpo and Flow-Factory, about 0 to 1; cosine as DanceGRPO on FLUX."""
    tokenizer: str | None = None
    """Folder or hub repository of CLIP's merges; none = beside the weights, else the public one."""


def load(spec: RewardSpec) -> clip_reward.ClipReward:
    """The reward of the file's name."""
    chosen = options.parse(spec, Options)
    return clip_reward.build(spec, PUBLISHED, tokenizer=chosen.tokenizer, scale=chosen.scale)
