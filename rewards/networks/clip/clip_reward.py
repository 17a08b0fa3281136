"""A CLIP as a reward: the cosine of a frame's and its prompt's features, averaged over some frames of the clip.

HPS-v2.1, the CLIP score and PickScore are this with other weights, pixels and scales. Where the references handle one
image, a clip's score is the mean of its frames' scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastgrpo.core.config import RewardSpec
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


@dataclass(frozen=True)
class Published:
    """What one reward's reference fixes."""

    part: str
    files: tuple[str, ...]
    """Names of the weights in a folder, the first that is there."""
    remedy: str
    """Where the weights come from, for messages."""
    frames: Rule
    """Frames scored where the spec says nothing."""
    known: Mapping[str, Any] | None = None
    """open_clip's model_cfg where the checkpoint is published without one."""
    resize: Resize | None = None
    """None = what the checkpoint's config says."""


class ClipReward(Reward):
    """One part, made by a CLIP. Scores a frame alone, so batching changes them by rounding only."""

    names: tuple[str, ...] = ()  # set by __init__

    def __init__(
        self,
        part: str,
        model: Any,
        tokenizer: ClipTokenizer,
        preprocess: Preprocess,
        rule: Rule,
        scale: float,
        batch_size: int,
        fingerprint: str,
    ) -> None:
        """scale: what the cosine is multiplied by;  batch_size: frames, or texts, per forward pass"""
        self.names = (part,)
        self.fingerprint = fingerprint
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.rule = rule
        self.scale = scale
        self.batch_size = batch_size
        self.model = model

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)

    def frames_used(self, frames: int, fps: float) -> list[int]:
        """Indices of the frames that are scored, of a clip of that many."""
        return choose(self.rule, frames)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: not used

        returns float32 [B], on the CPU. A clip with a score that is not finite is invalid.
        """
        check(pixels, prompts)
        chosen = pixels[:, self.frames_used(pixels.shape[1], fps)]
        per_clip = chosen.shape[1]
        with torch.inference_mode():
            seen = self.image_features(rearrange(chosen, "b f h w c -> (b f) h w c"))
            read = self.text_features(prompts).repeat_interleave(per_clip, 0)
            cosine = rearrange((seen * read).sum(-1), "(b f) -> b f", f=per_clip)
        scores = (self.scale * cosine).mean(1).clone()  # a plain tensor, outside inference mode
        valid = torch.isfinite(scores)
        return Scores({self.names[0]: scores.masked_fill(~valid, float("nan"))}, valid)

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] to unit vectors, float32 [N, E], on the CPU."""
        found = []
        for batch in images.split(self.batch_size):
            values = self.preprocess(batch).to(self.model.device, self.model.dtype)
            found.append(F.normalize(self.model.get_image_features(values).pooler_output.float(), dim=-1).cpu())
        return torch.cat(found)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors of the texts, float32 [N, E], on the CPU; a text that occurs again is computed once."""
        distinct = list(dict.fromkeys(prompts))
        found = []
        for batch in self.tokenizer(distinct).split(self.batch_size):
            output = self.model.get_text_features(batch.to(self.model.device))
            found.append(F.normalize(output.pooler_output.float(), dim=-1).cpu())
        return torch.cat(found)[[distinct.index(prompt) for prompt in prompts]]


def build(
    spec: RewardSpec,
    published: Published,
    *,
    tokenizer: str | None = None,
    resize: Resize | None = None,
    image_size: int | None = None,
    antialias: bool = True,
    scale: Literal["cosine", "logits", "logits / 26"] = "cosine",
) -> ClipReward:
    """The reward of a spec and its options. Raises UserError naming the file or the setting that is wrong."""
    device, dtype = options.device(spec), options.dtype(spec)
    file = weight_files.locate(spec.path, published.files, SIDE_FILES, "rewards.path", published.remedy)
    loaded = read_weights(file, published.known, image_size, dtype)
    preprocess = _preprocess(loaded, resize or published.resize, antialias, file)
    text = loaded.model.config.text_config
    merges_file = find(tokenizer, file)
    clean = clean_open_clip if loaded.open_clip else clean_transformers
    tokens = ClipTokenizer(read_merges(merges_file, text.vocab_size), text.max_position_embeddings, clean)
    factor = {"cosine": 1.0, "logits": loaded.logit_scale, "logits / 26": loaded.logit_scale / 26}[scale]
    rule = rule_of(spec, published.frames)
    settings = {
        "layout": SCORES_LAYOUT,
        "part": published.part,
        "network": loaded.model.config.to_dict() | {"transformers_version": None, "dtype": None},
        "preprocess": asdict(preprocess),
        "text": "open_clip" if loaded.open_clip else "transformers",
        "frames": rule,
        "scale": scale,
        "dtype": spec.dtype,
    }
    reward = ClipReward(
        published.part, loaded.model, tokens, preprocess, rule, factor, spec.batch_size,
        weight_files.fingerprint([file, merges_file], settings),
    )  # fmt: skip
    reward.to(device)
    return reward


def _preprocess(loaded: Loaded, resize: Resize | None, antialias: bool, file: Path) -> Preprocess:
    """How the frames are prepared: by the reference where it fixes that, else by the checkpoint's config."""
    said = loaded.preprocess
    usual = {"mode": "RGB", "interpolation": "bicubic"}
    other = [key for key, value in usual.items() if said.get(key, value) != value]
    chosen = resize or said.get("resize_mode") or "shortest"
    if other or chosen not in ("letterbox", "shortest", "squash"):
        key = other[0] if other else "resize_mode"
        raise UserError(
            f"{file.parent / OPEN_CLIP_CONFIG}: preprocess_cfg.{key}={said.get(key)}: not supported; "
            "use bicubic on RGB, resized by shortest or squash."
        )
    return Preprocess(
        size=said["size"],
        resize=chosen,
        mean=tuple(said.get("mean", CLIP_MEAN)),
        std=tuple(said.get("std", CLIP_STD)),
        antialias=antialias,
        crop="half_even" if loaded.open_clip else "down",
    )
