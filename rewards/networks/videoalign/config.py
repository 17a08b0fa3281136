"""What a VideoAlign checkpoint's model_config.json says, checked against what this code scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgrpo.core.errors import UserError

PARTS = ("VQ", "MQ", "TA")
SCORED: dict[str, dict[str, object]] = {
    "data_config": {
        "eval_dim": list(PARTS),
        "num_frames": None,
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
    },
    "model_config": {"use_special_tokens": True},
}
"""The kinds of checkpoint that this code scores: those that were published."""


@dataclass(frozen=True)
class Published:
    """Settings of the checkpoint that change its scores."""

    fps: float  # frames that are looked at per second
    most_pixels: int  # of a frame
    mean: tuple[float, ...]  # of each part; a score is (raw - mean) / std
    std: tuple[float, ...]


def published(content: Mapping[str, Any], raw: bool) -> Published:
    """The settings in model_config.json's content.  raw: scores as the network gives them, mean 0 and std 1

    Raises UserError for a missing key, or for a kind of checkpoint that this code does not score.
    """
    for name, wanted in SCORED.items():
        found = section(content, name)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise UserError(
                    f"rewards.path: model_config.json says {name}.{key} = {found.get(key)!r}, only {value!r} can be "
                    "scored; use the published VideoReward."
                )
    data = section(content, "data_config")
    if raw:
        mean, std = (0.0,) * len(PARTS), (1.0,) * len(PARTS)
    else:
        said = section(content, "inference_config")
        mean = tuple(number(said, f"{part}_mean", "inference_config") for part in PARTS)
        std = tuple(number(said, f"{part}_std", "inference_config", above=0.0) for part in PARTS)
    fps = number(data, "fps", "data_config", above=0.0)
    pixels = int(number(data, "max_frame_pixels", "data_config", above=0.0))
    return Published(fps, pixels, mean, std)


def lora_scale(content: Mapping[str, Any], rank: int) -> float:
    """What B @ A of a LoRA adapter of this rank is multiplied by (Hu et al. 2021; the root: Kalajdzievski 2023)."""
    said = section(content, "peft_lora_config")
    return number(said, "lora_alpha", "peft_lora_config") / (math.sqrt(rank) if said.get("use_rslora") else rank)


def section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One of the file's parts. Raises UserError where there is none."""
    found = content.get(name)
    if not isinstance(found, dict):
        remedy = " or score without it (rewards.options.raw)" if name == "inference_config" else ""
        raise UserError(f"rewards.path: model_config.json has no {name}; download it again{remedy}.")
    return found


def number(found: Mapping[str, Any], key: str, name: str, above: float | None = None) -> float:
    """A finite number of a section. Raises UserError for anything else."""
    value = found.get(key)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or (above is not None and not float(str(value)) > above):
        least = "" if above is None else f" above {above:g}"
        raise UserError(
            f"rewards.path: model_config.json says {name}.{key} = {value!r}, not a number{least}; correct it."
        )
    return float(str(value))
