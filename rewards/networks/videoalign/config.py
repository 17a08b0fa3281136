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
    """The settings in model_config.json's content.

    raw: scores as the network gives them, mean 0 and std 1
    Raises UserError for a missing key, or for a kind of checkpoint that this code does not score.
    """
    for name, wanted in SCORED.items():
        table = section(content, name)
        for key, value in wanted.items():
            if table.get(key) != value:
                raise UserError(
                    f"rewards.path: model_config.json says {name}.{key} = {table.get(key)!r}, only "
                    f"{value!r} can be scored; use the published VideoReward."
                )
    data = section(content, "data_config")
    if raw:
        mean, std = (0.0,) * len(PARTS), (1.0,) * len(PARTS)
    else:
        settings = section(content, "inference_config")
        mean = tuple(number(settings, f"{part}_mean", "inference_config") for part in PARTS)
        std = tuple(
            number(settings, f"{part}_std", "inference_config", above=0.0) for part in PARTS
        )
    fps = number(data, "fps", "data_config", above=0.0)
    pixels = int(number(data, "max_frame_pixels", "data_config", above=0.0))
    return Published(fps, pixels, mean, std)


def lora_scale(content: Mapping[str, Any], rank: int) -> float:
    """Factor of B @ A in a LoRA adapter of this rank (Hu et al. 2021).

    The root of rank-stabilised adapters is that of Kalajdzievski 2023.
    """
    settings = section(content, "peft_lora_config")
    return number(settings, "lora_alpha", "peft_lora_config") / (
        math.sqrt(rank) if settings.get("use_rslora") else rank
    )


def section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the file. Raises UserError where there is none."""
    value = content.get(name)
    if not isinstance(value, dict):
        remedy = " or score without it (rewards.options.raw)" if name == "inference_config" else ""
        raise UserError(
            f"rewards.path: model_config.json has no {name}; download it again{remedy}."
        )
    return value


def number(table: Mapping[str, Any], key: str, name: str, above: float | None = None) -> float:
    """A finite number of the section `name`. Raises UserError for anything else.

    above: the value that it must exceed. None: any number will do
    """
    value = table.get(key)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or (above is not None and not float(str(value)) > above):
        least = "" if above is None else f" above {above:g}"
        raise UserError(
            f"rewards.path: model_config.json says {name}.{key} = {value!r}, not a number{least}; "
            "correct it."
        )
    return float(str(value))
