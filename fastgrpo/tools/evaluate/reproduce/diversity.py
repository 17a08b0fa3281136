"""How much the pictures of one prompt differ: Figure 7 as a number, which is ours, not the paper's.

Per prompt the mean of 1 - cosine over all pairs of seeds, of the image vectors of the CLIP that
also gives the CLIP score; base against trained, prompts resampled. 0: all seeds look alike.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json_or_none
from fastgrpo.rewards.networks.clip.clip_reward import ClipReward
from fastgrpo.tools.evaluate.benchmark.choosing import Judge, Unknown
from fastgrpo.tools.evaluate.benchmark.estimates import Measured, measured
from fastgrpo.tools.evaluate.benchmark.sheet import without_nan
from fastgrpo.tools.sample.sample_files import MANIFEST
from fastgrpo.tools.score import clip_files

MEASURE = "mean 1 - cosine of CLIP's image vectors over pairs of seeds; ours, not the paper's"
SIDES = ("base", "file")
"""What the manifest of `fastgrpo sample` calls the two sides' files."""


def spread(vectors: Tensor) -> float:
    """Mean of 1 - cosine over all pairs; NaN with fewer than two.  vectors: float32 [N, E], units"""
    count = len(vectors)
    if count < 2:
        return float("nan")
    cosines = vectors.double() @ vectors.double().T
    pairs = torch.triu_indices(count, count, offset=1)
    return float((1 - cosines[pairs[0], pairs[1]]).mean())


def of_samples(folder: Path, judge: Judge | Unknown) -> Measured | Unknown:
    """The diversity of the samples in a folder of `fastgrpo sample --against-base`.

    Raises UserError for a folder without a manifest.
    """
    if isinstance(judge, Unknown):
        return judge
    reward = rewards.load(judge.spec)
    if not isinstance(reward, ClipReward):
        return Unknown(f"{judge.spec.name} gives no vectors of images")
    manifest = read_json_or_none(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"{folder / MANIFEST}: missing or damaged; start the same command again.")
    vectors: dict[str, dict[str, list[Tensor]]] = {}
    for sample in manifest["samples"]:
        own = vectors.setdefault(sample["prompt"], {side: [] for side in SIDES})
        for side, finite in zip(SIDES, ("base_finite", "finite"), strict=True):
            if sample[finite]:
                own[side].append(_vector(folder / sample[side], reward))
    rows = [[_of(own[side]) for side in SIDES] for own in vectors.values()]
    return measured(np.array(rows), range(len(rows)), [""] * len(rows), {})


def _of(vectors: list[Tensor]) -> float:
    """Their spread; NaN without any.  vectors: float32 [E] each"""
    return spread(torch.stack(vectors)) if vectors else float("nan")


def _vector(file: Path, reward: ClipReward) -> Tensor:
    """The unit vector of a clip, float32 [E]: the mean over the frames that the reward looks at."""
    clip = clip_files.read(file, None, None)
    frames = clip.pixels[reward.frames_used(len(clip.pixels), clip.fps)]
    return torch.nn.functional.normalize(reward.image_features(frames).mean(0), dim=-1)


def as_json(found: Mapping[str, Measured | Unknown]) -> str:
    """By run: both sides and the difference with their intervals, or why there is none."""
    content: dict[str, Any] = {"measure": MEASURE, "runs": {}}
    for name, one in found.items():
        if isinstance(one, Unknown):
            content["runs"][name] = {"unknown": one.reason}
        else:
            content["runs"][name] = asdict(one.overall)
    return json.dumps(without_nan(content), indent=1) + "\n"
