"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): which picture people would pick for a prompt.

The part is PickScore. A CLIP ViT-H-14 in transformers' layout; the score is the cosine times the
learned temperature, as its authors give it. A clip's score is the mean over its frames. Each clip
is scored against its own prompt.
"""

from typing import Literal

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.reward import Download, RewardSize
from fastgrpo.rewards.common import options
from fastgrpo.rewards.common.frames import count_by
from fastgrpo.rewards.networks.clip import clip_reward

FRAMES = "all"
# ViT-H-14; tokens of image and text
SIZE = RewardSize(parameters=0.99e9, tokens=257 + 77, frames_scored=count_by(FRAMES))

PARTS = ("PickScore",)
DIFFERENTIABLE = True
DOWNLOADS = {
    "path": Download(
        "yuvalkirstain/PickScore_v1",
        (
            "model.safetensors",
            "config.json",
            "preprocessor_config.json",
            "merges.txt",
            "tokenizer.json",
        ),
    ),
}
PUBLISHED = clip_reward.Published(
    part=PARTS[0],
    files=("model.safetensors", "pytorch_model.bin"),
    remedy="give the folder of PickScore_v1, or its hub repository yuvalkirstain/PickScore_v1",
    frames=FRAMES,
    resize="shortest",
)


class Options(Section):
    """`rewards.options` of pick_score."""

    scale: Literal["logits", "logits / 26", "cosine"] = "logits"
    """Scale of the score: logits as its authors give it, cosine as DanceGRPO on FLUX.

    logits / 26 is that of flow_grpo and Flow-Factory, about 0 to 1.
    """
    tokenizer: str | None = None
    """Folder or hub repository of CLIP's merges. None: beside the weights, else the public one."""


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail."""
    options.parse(spec, Options)
    clip_reward.check_spec(spec, PUBLISHED)


def load(spec: RewardSpec) -> clip_reward.ClipReward:
    """The reward of the file's name."""
    chosen = options.parse(spec, Options)
    choices = clip_reward.Choices(scale=chosen.scale)
    return clip_reward.build(spec, PUBLISHED, chosen.tokenizer, choices)
