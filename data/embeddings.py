"""The embedding cache: each prompt goes through the text encoders once per run.

One safetensors file per run folder, with the fingerprint of what made it; a file of other prompts or of another model
is made anew.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastgrpo.models import Condition, Policy

ENCODER_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


def fingerprint(model_path: str, prompts: Sequence[str]) -> str:
    """A hash over the prompts and over names, sizes and times of the text encoders' files."""
    digest = hashlib.sha256(json.dumps([model_path, *prompts]).encode())
    for part in ENCODER_PARTS:
        for file in sorted((Path(model_path) / part).glob("*")):
            digest.update(f"{part}/{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def make(policy: Policy, prompts: Sequence[str], file: Path, key: str) -> None:
    """Encode the prompts and publish them as one file, unless it is there already with the same key."""
    if file.exists() and _key(file) == key:
        return
    tensors = {
        f"{index:06d}.{name}": tensor.cpu().contiguous()
        for index, condition in enumerate(policy.encode(prompts))
        for name, tensor in condition.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        partial.write_bytes(save(tensors, metadata={"key": key}))
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read(file: Path, count: int) -> list[Condition]:
    """The conditions of `count` prompts, in their order, in host memory."""
    conditions: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            index, field = name.split(".", 1)
            conditions[int(index)][field] = tensors.get_tensor(name)
    return list(conditions)


def _key(file: Path) -> str | None:
    """What made a cache file; none for a damaged one."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return metadata.get("key")
