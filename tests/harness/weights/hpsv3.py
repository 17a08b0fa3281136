"""A tiny random HPSv3 in the published layout, with a base folder and a template of its own.

Seconds to score.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.rewards.networks.hpsv3.network import empty_head
from tests.harness.weights import videoalign

INSTRUCTION = "\nJudge the picture. \n\n**Quality:**  \nlook at it. \nText - {text_prompt}  \n\n\n"
SUFFIX = "\nHow good is it: <|Reward|>\n\nEND\n"
TEMPLATE = INSTRUCTION + SUFFIX


def write(folder: Path) -> None:
    """folder/HPSv3.safetensors, base/ and template.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base").mkdir()
    tokenizer = videoalign.new_tokenizer()
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    config = base_config()
    (folder / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "template.txt").write_bytes(TEMPLATE.encode())
    save_file(state(config, tokenizer.get_vocab_size() + 1), folder / "HPSv3.safetensors")


def base_config() -> dict[str, Any]:
    """config.json as the base model's; its language head is no copy of the embedding."""
    return videoalign.base_config(videoalign.new_tokenizer()) | {"tie_word_embeddings": False}


def spec(folder: Path, batch_size: int = 8, **more: str | bool) -> RewardSpec:
    """A recipe's entry for the folder. more: further options"""
    return RewardSpec(
        name="hpsv3",
        weights={"HPSv3": 1.0},
        path=str(folder),
        device="cpu",
        batch_size=batch_size,
        options=videoalign.options(folder, TEMPLATE) | more,
    )


def state(config: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """The published names with random weights, large enough that scores depend on what is shown.

    rows: of the token embedding, one more than the tokenizer has entries
    """
    shapes = {
        re.sub(r"^language_model\.", "model.", name): tensor.shape
        for name, tensor in videoalign.meta_body({**config, "vocab_size": rows}).state_dict().items()
    }
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    head = empty_head(config["hidden_size"]).state_dict()
    shapes |= {f"rm_head.{name}": tensor.shape for name, tensor in head.items()}
    random = torch.Generator().manual_seed(11)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        gain = name.endswith("weight") and len(shape) == 1
        fan = shape[1:].numel() if len(shape) > 1 and "embed_tokens" not in name else 1
        size = 0.1 if len(shape) == 1 else 1.5 / fan**0.5
        found[name] = torch.randn(shape, generator=random) * size + gain
    return found
