"""`fastgrpo convert-videoalign`: the published VideoAlign checkpoint as one safetensors file.

The file holds the weights with the adapters folded in, so that a server starts without a pickle and
without folding; scores are equal bit for bit. Beside it lie the three small files that it needs, so
that the folder is complete.
"""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import sha256
from fastgrpo.rewards.networks.videoalign import network
from fastgrpo.rewards.networks.videoalign.checkpoint import (
    BASE,
    CONVERTED,
    FORMAT,
    Checkpoint,
    Loaded,
    as_text,
    find,
    read,
)
from fastgrpo.rewards.networks.videoalign.network import HEAD


def convert(source: Path, target: Path, base: str | None, dtype: str | None) -> Path:
    """Write `target`, a new folder or the source itself, as a whole or not at all.

    base: as rewards.options.base
    dtype: "bfloat16" halves the file, which then serves that precision alone. None: what was folded
    stays in float32 and the rest as published, for any precision
    returns the safetensors file
    Raises UserError where the source is wrong or the target has something already.
    """
    target = target.resolve()
    if (source / CONVERTED).exists():
        raise UserError(
            f"SRC={source}: has {CONVERTED} already; use it as it is, or delete it to convert "
            "again."
        )
    checkpoint = find(str(source), base)
    if checkpoint.tokenizer is None:
        raise UserError(f"--base: no tokenizer.json; {BASE}.")
    inside = target.exists() and target.samefile(source)
    if not inside and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"DST={target}: is there already and not empty; name a new folder, or SRC itself."
        )
    loaded = read(checkpoint)
    network.matching_body(loaded.tensors, checkpoint.base, str(checkpoint.files[-1]))
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, checkpoint, loaded, dtype)
        _publish(partial, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"DST={target}: cannot be written ({error}); make room or choose another folder."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / CONVERTED


def _write(folder: Path, checkpoint: Checkpoint, loaded: Loaded, dtype: str | None) -> None:
    """Write the complete converted folder, which is on the disk when this returns."""
    assert checkpoint.tokenizer is not None
    folder.mkdir(parents=True)
    precision = getattr(torch, dtype) if dtype else None
    stored = {name: tensor.contiguous() for name, tensor in loaded.tensors.items()}
    if precision is not None:
        stored = {
            name: tensor if name == HEAD else tensor.to(precision)
            for name, tensor in stored.items()
        }
    config = checkpoint.content.get("peft_lora_config")
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    metadata = {
        "format": FORMAT,
        "stored": dtype or "exact",
        "sources": as_text(
            {f"{file.parent.name}/{file.name}": sha256(file) for file in checkpoint.files}
        ),
        "model_config_sha256": sha256(checkpoint.folder / "model_config.json"),
        "tokenizer_sha256": sha256(checkpoint.tokenizer),
        "lora": as_text({"rank": loaded.rank, "alpha": alpha, "scale": loaded.scale}),
        "output_dim": str(len(stored[HEAD])),
        "versions": as_text({name: version(name) for name in ("torch", "transformers")}),
    }
    save_file(stored, folder / CONVERTED, metadata=metadata)
    shutil.copyfile(checkpoint.folder / "model_config.json", folder / "model_config.json")
    shutil.copyfile(checkpoint.tokenizer, folder / "tokenizer.json")
    # save_file lets no one but its writer read the file
    shutil.copymode(folder / "tokenizer.json", folder / CONVERTED)
    (folder / "config.json").write_text(as_text(checkpoint.base) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _publish(folder: Path, target: Path) -> None:
    """Move the complete folder to the target.

    Into a folder that has the checkpoint it goes file by file, the weights last.
    """
    if not target.exists() or not any(target.iterdir()):
        os.replace(folder, target)
        return
    new = sorted(folder.iterdir(), key=lambda file: file.name == CONVERTED)
    for file in new:
        there = target / file.name
        if there.exists() and there.read_bytes() != file.read_bytes():
            raise UserError(f"DST={target}: has another {file.name}; name a new folder.")
    for file in new:
        os.replace(file, target / file.name)
