"""CLIP score: the cosine between the picture and its prompt. Part CLIP.

DanceGRPO used apple/DFN5B-CLIP-ViT-H-14-378 beside HPS, weights 1.4 to 0.7. Its pixels are its own,
never those that were prepared for HPS. Any open_clip checkpoint with its open_clip_config.json
works, and any CLIP in transformers' layout, such as openai/clip-vit-large-patch14, which
Flow-Factory applies to the first frame, the default here.
"""

from typing import Annotated, Literal

from pydantic import Field

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.reward import Download, RewardSize
from fastgrpo.rewards.common import options
from fastgrpo.rewards.common.frames import count_by
from fastgrpo.rewards.networks.clip import clip_reward

FRAMES = "first"
# ViT-H-14-378; tokens of image and text
SIZE = RewardSize(parameters=0.99e9, tokens=729 + 77, frames_scored=count_by(FRAMES))

PARTS = ("CLIP",)
DIFFERENTIABLE = True
DOWNLOADS = {
    "path": Download(
        "apple/DFN5B-CLIP-ViT-H-14-378",
        ("open_clip_pytorch_model.bin", "open_clip_config.json", "merges.txt", "tokenizer.json"),
    ),
}
PUBLISHED = clip_reward.Published(
    part=PARTS[0],
    files=(
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
        "pytorch_model.bin",
    ),
    remedy="give a CLIP's folder or hub repository, such as apple/DFN5B-CLIP-ViT-H-14-378",
    frames=FRAMES,
)


class Options(Section):
    """`rewards.options` of clip_score."""

    resize: Literal["shortest", "squash"] | None = None
    """Resize of the frames. None: as the checkpoint's config says.

    shortest keeps the ratio of the sides and crops the centre; squash does not keep the ratio.
    """
    image_size: Annotated[int, Field(gt=0)] | None = None
    """Side of the network's input, pixels. None: the config's.

    The number of patches must be the config's: 384 fits where it says 378.
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
    choices = clip_reward.Choices(resize=chosen.resize, image_size=chosen.image_size)
    return clip_reward.build(spec, PUBLISHED, chosen.tokenizer, choices)
