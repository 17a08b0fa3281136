"""A CLIP as a reward: the cosine of a frame's features and its prompt's, mean over some frames.

HPS-v2.1, the CLIP score and PickScore are this with other weights, pixels and scales. Where the
references handle one image, a clip's score is the mean of its frames' scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastgrpo.core.config import RewardSpec, paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards.common import options, weight_files
from fastgrpo.rewards.common.clips import check
from fastgrpo.rewards.common.frames import Rule, choose, rule_of
from fastgrpo.rewards.networks.clip.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from fastgrpo.rewards.networks.clip.tokenizer import (
    FILES,
    ClipTokenizer,
    clean_open_clip,
    clean_transformers,
    find,
    read_merges,
)
from fastgrpo.rewards.networks.clip.weights import OPEN_CLIP_CONFIG, Loaded
from fastgrpo.rewards.networks.clip.weights import read as read_weights

SCORES_LAYOUT = 1
"""Raise when a change of the code changes scores: it is part of the fingerprint."""

Resize = Literal["letterbox", "shortest", "squash"]
SIDE_FILES = ("open_clip_config.json", "config.json", "preprocessor_config.json", *FILES)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Settings that one reward's reference fixes."""

    part: str
    files: tuple[str, ...]
    """Names of the weights in a folder, of which the first that is there counts."""
    remedy: str
    """Where the weights come from, for messages."""
    frames: Rule
    """Frames scored where the spec says nothing."""
    known: Mapping[str, Any] | None = None
    """open_clip's model_cfg where the checkpoint is published without one."""
    resize: Resize | None = None
    """Resize of the frames. None: as the checkpoint's config says."""


@dataclass(frozen=True)
class Choices:
    """Settings that a recipe's options choose; the defaults are what most references do."""

    resize: Resize | None = None
    """Resize of the frames. None: the reference's, else as the checkpoint's config says."""
    image_size: int | None = None
    """Side of the network's input, pixels. None: the config's."""
    antialias: bool = True
    """Whether letter-boxing antialiases."""
    scale: Literal["cosine", "logits", "logits / 26"] = "cosine"
    """Scale of the score; logits multiply by the learned temperature."""


@dataclass(frozen=True)
class Rating:
    """Rule that makes one part's score of the cosines of some frames."""

    part: str
    rule: Rule  # which frames
    scale: float  # that the cosine is multiplied by
    batch_size: int  # frames, or texts, per forward pass


class ClipReward(Reward):
    """One part, made by a CLIP that scores frames alone: batching changes it by rounding only."""

    names: tuple[str, ...] = ()  # set by __init__

    def __init__(
        self,
        model: Any,
        tokenizer: ClipTokenizer,
        preprocess: Preprocess,
        rating: Rating,
        fingerprint: str,
    ) -> None:
        """Take a network that is on its device.

        model: a CLIPModel;  fingerprint: hash of all that makes the scores
        """
        self.names = (rating.part,)
        self.fingerprint = fingerprint
        self.model = model
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.rating = rating

    def modules(self) -> Sequence[nn.Module]:
        """The network."""
        return (self.model,)

    def frames_used(self, frames: int, fps: float) -> list[int]:
        """Indices of the frames that are scored, of a clip of that many."""
        return choose(self.rating.rule, frames)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Mean score of the frames that are used, of each of B clips.

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: not used
        returns float32 [B], on the CPU. A clip with a score that is not finite is invalid.
        """
        check(pixels, prompts)
        chosen = pixels[:, self.frames_used(pixels.shape[1], fps)]
        per_clip = chosen.shape[1]
        with torch.inference_mode():
            images = self.image_features(rearrange(chosen, "b f h w c -> (b f) h w c"))
            texts = self.text_features(prompts).repeat_interleave(per_clip, 0)
            cosine = rearrange((images * texts).sum(-1), "(b f) -> b f", f=per_clip)
        # cloned outside inference mode: a plain tensor
        scores = (self.rating.scale * cosine).mean(1).clone()
        valid = torch.isfinite(scores)
        return Scores({self.names[0]: scores.masked_fill(~valid, float("nan"))}, valid)

    def differentiable(
        self, frames: Tensor, prompts: Sequence[str], fps: float
    ) -> dict[str, Tensor]:
        """Scores of frames that are not rounded, float32 [B], with their gradient.

        frames: float32 [B, F, H, W, 3], 0 to 255;  fps: not used
        Where the reference rounds what it has resized, as Pillow does, they differ by that.
        """
        chosen = frames[:, self.frames_used(frames.shape[1], fps)]
        per_clip = chosen.shape[1]
        values = self.preprocess.differentiable(rearrange(chosen, "b f h w c -> (b f) h w c"))
        images = torch.cat([self._features(part) for part in values.split(self.rating.batch_size)])
        with torch.no_grad():
            texts = self.text_features(prompts).to(images.device).repeat_interleave(per_clip, 0)
        cosine = rearrange((images * texts).sum(-1), "(b f) -> b f", f=per_clip)
        return {self.names[0]: (self.rating.scale * cosine).mean(1)}

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors of images, uint8 [N, H, W, 3]: float32 [N, E], on the CPU."""
        batches = images.split(self.rating.batch_size)
        return torch.cat([self._features(self.preprocess(batch)).cpu() for batch in batches])

    def _features(self, values: Tensor) -> Tensor:
        """Unit vectors of prepared images [N, 3, S, S]: float32 [N, E], on the network's device."""
        output = self.model.get_image_features(values.to(self.model.device, self.model.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors of the texts, float32 [N, E], on the CPU.

        A text that occurs again is computed once.
        """
        distinct = list(dict.fromkeys(prompts))
        features = []
        for batch in self.tokenizer(distinct).split(self.rating.batch_size):
            output = self.model.get_text_features(batch.to(self.model.device))
            features.append(F.normalize(output.pooler_output.float(), dim=-1).cpu())
        return torch.cat(features)[[distinct.index(prompt) for prompt in prompts]]


def check_spec(spec: RewardSpec, published: Published) -> None:
    """Raise UserError where the device or the file of the weights is not there; nothing is read.

    A hub repository is not asked for.
    """
    options.device(spec)
    rule_of(spec, published.frames)
    if spec.path is None or not paths.is_hub_id(spec.path):
        _weights(spec, published)


def _weights(spec: RewardSpec, published: Published) -> Path:
    """The file of the weights, fetched where it is on the hub. Raises UserError for no such file."""
    return weight_files.locate(
        spec.path,
        published.files,
        beside=SIDE_FILES,
        where="rewards.path",
        remedy=published.remedy,
    )


def build(
    spec: RewardSpec, published: Published, tokenizer: str | None, choices: Choices
) -> ClipReward:
    """The reward of a spec and its options, on the spec's device.

    tokenizer: folder or hub repository of CLIP's merges. None: beside the weights, else public
    Raises UserError naming the file or the setting that is wrong.
    """
    device, dtype = options.device(spec), options.dtype(spec)
    file = _weights(spec, published)
    loaded = read_weights(file, published.known, choices.image_size, dtype)
    preprocess = _preprocess(loaded, choices.resize or published.resize, choices.antialias, file)
    text = loaded.model.config.text_config
    merges_file = find(tokenizer, file)
    clean = clean_open_clip if loaded.open_clip else clean_transformers
    tokens = ClipTokenizer(
        read_merges(merges_file, text.vocab_size), text.max_position_embeddings, clean
    )
    learned = loaded.logit_scale
    scale = {"cosine": 1.0, "logits": learned, "logits / 26": learned / 26}[choices.scale]
    rule = rule_of(spec, published.frames)
    settings = {
        "layout": SCORES_LAYOUT,
        "part": published.part,
        "network": loaded.model.config.to_dict() | {"transformers_version": None, "dtype": None},
        "preprocess": asdict(preprocess),
        "text": "open_clip" if loaded.open_clip else "transformers",
        "frames": rule,
        "scale": choices.scale,
        "dtype": spec.dtype,
    }
    rating = Rating(published.part, rule, scale, spec.batch_size)
    fingerprint = weight_files.fingerprint([file, merges_file], settings)
    reward = ClipReward(
        model=loaded.model,
        tokenizer=tokens,
        preprocess=preprocess,
        rating=rating,
        fingerprint=fingerprint,
    )
    reward.model.to(device)
    return reward


def _preprocess(loaded: Loaded, resize: Resize | None, antialias: bool, file: Path) -> Preprocess:
    """Preprocessing of the frames: the reference's where it fixes that, else the config's."""
    config = loaded.preprocess
    usual = {"mode": "RGB", "interpolation": "bicubic"}
    other = [key for key, value in usual.items() if config.get(key, value) != value]
    chosen = resize or config.get("resize_mode") or "shortest"
    if other or chosen not in ("letterbox", "shortest", "squash"):
        key = other[0] if other else "resize_mode"
        raise UserError(
            f"{file.parent / OPEN_CLIP_CONFIG}: preprocess_cfg.{key}={config.get(key)}: not "
            "supported; use bicubic on RGB, resized by shortest or squash."
        )
    return Preprocess(
        size=config["size"],
        resize=chosen,
        mean=tuple(config.get("mean", CLIP_MEAN)),
        std=tuple(config.get("std", CLIP_STD)),
        antialias=antialias,
        crop="half_even" if loaded.open_clip else "down",
    )
