"""What colour an object has, as GenEval asks a CLIP ViT-L/14.

Three texts for each colour and class; a colour's vector is the mean of their unit vectors, made a
unit vector again; the nearest colour counts. The picture around the object is painted grey before
it is cut to the object's box, and the network's crop then cuts the ends off what is long.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.rewards.networks.clip import clip_reward
from fastgrpo.rewards.networks.geneval.names import COLOURS
from fastgrpo.rewards.networks.geneval.rules import Found

TEXTS = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")
GREY = 0x99
PUBLISHED = clip_reward.Published(
    part="colour",
    files=("model.safetensors", "pytorch_model.bin"),
    remedy="give a folder or hub id of openai/clip-vit-large-patch14",
    frames="all",
)


class Colours:
    """Classifier of an object's colour."""

    def __init__(self, clip: clip_reward.ClipReward) -> None:
        """Take a CLIP that is on its device."""
        self.clip = clip
        self._vectors: dict[str, Tensor] = {}

    def __call__(self, picture: Tensor, found: Found) -> str:
        """The colour of an object of a picture, uint8 [H, W, 3]."""
        vector = self.clip.image_features(cut_out(picture, found)[None])[0]
        return COLOURS[int((self.vectors(found.name) @ vector).argmax())]

    def vectors(self, name: str) -> Tensor:
        """A class's colours as unit vectors, float32 [10, E]."""
        if name not in self._vectors:
            texts = [text.format(c=colour, name=name) for colour in COLOURS for text in TEXTS]
            each = self.clip.text_features(texts).unflatten(0, (len(COLOURS), len(TEXTS)))
            self._vectors[name] = F.normalize(each.mean(1), dim=-1)
        return self._vectors[name]


def cut_out(picture: Tensor, found: Found) -> Tensor:
    """An object on grey, cut to its box.

    picture: uint8 [H, W, 3].  returns uint8 [h, w, 3]
    """
    left, top, right, bottom = map(int, found.box)
    painted = torch.where(found.mask[..., None], picture, torch.tensor(GREY, dtype=torch.uint8))
    return painted[top:bottom, left:right].contiguous()


def spec_of(spec: RewardSpec, path: str) -> RewardSpec:
    """The CLIP's own block, of a GenEval block.  path: of its weights"""
    changed: dict[str, Any] = {"name": "clip_score", "path": path, "dtype": "float32"}
    return spec.model_copy(update=changed | {"frames": None, "options": {}, "threshold": {}})


def build(spec: RewardSpec, path: str, tokenizer: str | None) -> Colours:
    """The classifier on the spec's device.  path: of the CLIP;  tokenizer: of its merges

    Raises UserError for weights or merges that are not a CLIP's.
    """
    clip = clip_reward.build(spec_of(spec, path), PUBLISHED, tokenizer, clip_reward.Choices())
    # torchvision's crop, which the benchmark's preprocessing is made of
    clip.preprocess = replace(clip.preprocess, crop="half_even")
    return Colours(clip)
