"""HPS-v2.1 (Wu et al. 2023, arXiv 2306.09341): how much people would prefer the picture. Part HPS.
The score is the bare cosine, without CLIP's temperature. Frames are letter-boxed, not cropped.
DanceGRPO scores the first frame of a video, the default here; it is the easiest to game, so give
`frames` where that matters. The reference ran in float16 autocast; here the weights are float32, or
bfloat16 by the spec.
"""

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.reward import Download, RewardSize
from fastgrpo.rewards.common import options
from fastgrpo.rewards.common.frames import count_by
from fastgrpo.rewards.networks.clip import clip_reward, weights

FRAMES = "first"
# ViT-H-14; tokens of image and text
SIZE = RewardSize(parameters=0.99e9, tokens=257 + 77, frames_scored=count_by(FRAMES))

PARTS = ("HPS",)
DIFFERENTIABLE = True
DOWNLOADS = {
    "path": Download("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
    "options.tokenizer": Download("openai/clip-vit-large-patch14", ("merges.txt",)),
}
PUBLISHED = clip_reward.Published(
    part=PARTS[0],
    files=("HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors"),
    remedy="give HPS_v2.1_compressed.pt, from the hub repository xswu/HPSv2, or its folder",
    frames=FRAMES,
    known=weights.VIT_H_14,
    resize="letterbox",
)


class Options(Section):
    """`rewards.options` of hps."""

    antialias: bool = True
    """Filter of the letter-boxing: true as torchvision 0.17 and later, false as earlier ones.

    DanceGRPO ran with a later one.
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
    choices = clip_reward.Choices(antialias=chosen.antialias)
    return clip_reward.build(spec, PUBLISHED, chosen.tokenizer, choices)
