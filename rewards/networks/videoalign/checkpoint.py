"""VideoAlign's published or converted folder as tensors and settings.

`fastgrpo convert-videoalign` makes the second of the first.
Three forms, the first that is there:
  videoalign.safetensors                    converted: adapters folded, names of Qwen2VLModel
  checkpoint-N/model.pth                    published: a whole PEFT state dict
  checkpoint-N/{adapter_model.safetensors,  split: adapters and trained weights alone; all other
                non_lora_state_dict.pth}    weights come from the base model's safetensors
of the largest N, with model_config.json beside them. The base model's config.json and the tokenizer
come from `rewards.options.base`, a folder or hub id of Qwen2-VL-2B-Instruct; a converted folder
holds both.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.common import weight_files
from fastgrpo.rewards.networks.videoalign.config import lora_scale

CONVERTED = "videoalign.safetensors"
FORMAT = "fastgrpo videoalign 1"
BASE = "name a folder or hub id of Qwen2-VL-2B-Instruct: its config.json and tokenizer.json"
PREFIX = "base_model.model."
ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Files and settings of a checkpoint."""

    files: tuple[Path, ...]  # that hold the weights
    content: dict[str, Any]  # that model_config.json holds
    base: dict[str, Any]  # that the base model's config.json holds
    tokenizer: Path | None  # tokenizer.json
    folder: Path

    @property
    def converted(self) -> bool:
        return self.files[0].name == CONVERTED


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's weights with the adapters folded in.

    Names are those of Qwen2VLModel, and "rm_head.weight".
    """

    tensors: dict[str, Tensor]
    rank: int | None  # of the adapters; None: there were none
    scale: float | None  # alpha / rank, or alpha / sqrt(rank)


def find_folder(path: str | None) -> Path:
    """The folder of a checkpoint. Raises UserError where it is none."""
    if path is None or not Path(path).is_dir():
        raise UserError(
            f"rewards.path={path}: no folder; name the downloaded KlingTeam/VideoReward, which "
            "holds model_config.json, or what convert-videoalign made of it."
        )
    folder = Path(path)
    if not (folder / "model_config.json").is_file():
        raise UserError(
            f"rewards.path={path}: has no model_config.json; name the folder of the published "
            "checkpoint."
        )
    return folder


def find(path: str | None, base: str | None) -> Checkpoint:
    """Find the files of a checkpoint and read its settings.

    base: `rewards.options.base`
    Raises UserError where a file is missing.
    """
    folder = find_folder(path)
    content = weight_files.read_json(folder / "model_config.json")
    model = content.get("model_config")
    named = str(model.get("model_name_or_path") or "") if isinstance(model, dict) else ""
    if (folder / CONVERTED).is_file():
        here = str(folder) if (folder / "config.json").is_file() else None
        return Checkpoint(
            files=(folder / CONVERTED,),
            content=content,
            base=_base(base or here or named),
            tokenizer=_tokenizer(folder, base or here or named),
            folder=folder,
        )
    steps = [
        (int(sub.name[11:]), sub)
        for sub in folder.glob("checkpoint-*")
        if sub.name[11:].isdecimal() and sub.is_dir()
    ]
    if not steps:
        raise UserError(
            f"rewards.path={path}: has no {CONVERTED} and no checkpoint-N; download it again."
        )
    newest = max(steps)[1]
    inside = content.get("base_model_config")
    config = inside if isinstance(inside, dict) and base is None else _base(base or named)
    return Checkpoint(
        files=_weight_files(newest, base or named),
        content=content,
        base=config,
        tokenizer=_tokenizer(newest, base or named),
        folder=folder,
    )


def _weight_files(step: Path, base: str) -> tuple[Path, ...]:
    if (step / "model.pth").is_file():
        return (step / "model.pth",)
    split = (step / "adapter_model.safetensors", step / "non_lora_state_dict.pth")
    absent = [file.name for file in split if not file.is_file()]
    if absent:
        raise UserError(
            f"rewards.path: {step} has neither model.pth nor {absent[0]}; download it again."
        )
    local = Path(base)
    return (*sorted(local.glob("*.safetensors")), *split) if base and local.is_dir() else split


def _base(base: str) -> dict[str, Any]:
    file = weight_files.locate(
        base or None, ["config.json"], beside=[], where="rewards.options.base", remedy=BASE
    )
    return weight_files.read_json(file)


def _tokenizer(step: Path, base: str) -> Path | None:
    """The checkpoint's own tokenizer.json, else the base model's; None where neither is at hand."""
    for file in (step / "tokenizer" / "tokenizer.json", step / "tokenizer.json"):
        if file.is_file():
            return file
    if not base or (Path(base).is_dir() and not (Path(base) / "tokenizer.json").is_file()):
        return None
    return weight_files.locate(
        base, ["tokenizer.json"], beside=[], where="rewards.options.base", remedy=BASE
    )


def read(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Loaded:
    """The weights on the CPU, in the precision of the file.

    dtype: of those that an adapter was folded into
    """
    if checkpoint.converted:
        return Loaded(weight_files.read(checkpoint.files[0]), None, None)
    whole: dict[str, Tensor] = {}
    for file in checkpoint.files:  # later ones hold what was trained, and replace the base model's
        whole |= {
            name.removeprefix(PREFIX): tensor for name, tensor in weight_files.read(file).items()
        }
    adapters: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if adapter := ADAPTER.fullmatch(name):
            adapters.setdefault(_ours(adapter[1]), {})[adapter[2]] = tensor
        elif name != "lm_head.weight":  # the language head, which scores do not use
            plain[_ours(name)] = tensor
    return _fold(plain, adapters, checkpoint, dtype)


def _ours(name: str) -> str:
    """The name in Qwen2VLModel of transformers 5 of a weight of transformers 4 under PEFT."""
    return re.sub(r"^model\.", "language_model.", name).replace(".base_layer.", ".")


def _fold(
    plain: dict[str, Tensor],
    adapters: Mapping[str, Mapping[str, Tensor]],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
) -> Loaded:
    """W + scale B A for each adapter, computed in float32 and stored in dtype.

    W: [out, in];  A: [rank, in];  B: [out, rank]
    """
    rank, scale = None, None
    for module, pair in adapters.items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"} or name not in plain:
            raise UserError(
                f"rewards.path={checkpoint.files[-1]}: the adapter of {module} lacks its A, its B "
                "or its weight; download it again, or name the base model's weights with "
                "rewards.options.base."
            )
        a, b = pair["A"], pair["B"]
        if (
            a.ndim != 2
            or b.ndim != 2
            or plain[name].shape != (len(b), a.shape[1])
            or b.shape[1] != len(a)
        ):
            raise UserError(
                f"rewards.path={checkpoint.files[-1]}: the adapter of {module} does not fit; "
                "download it again."
            )
        if rank is not None and rank != len(a):
            raise UserError(
                f"rewards.path={checkpoint.files[-1]}: adapters of ranks {rank} and {len(a)}; "
                "download it again."
            )
        rank = len(a)
        scale = lora_scale(checkpoint.content, rank)
        plain[name] = (plain[name].float() + scale * (b.float() @ a.float())).to(dtype)
    return Loaded(plain, rank, scale)


def provenance(file: Path) -> dict[str, str]:
    """Metadata that convert-videoalign wrote into its file.

    Raises UserError where the file is of another kind.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"rewards.path={file}: damaged ({error}); convert the checkpoint again."
        ) from None
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"rewards.path={file}: not written by this convert-videoalign; convert the checkpoint "
            "again."
        )
    return dict(metadata)


def check_precision(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Raise UserError where a converted file holds less than `dtype` needs: scores would differ."""
    if not checkpoint.converted:
        return
    stored = provenance(checkpoint.files[0])["stored"]
    if stored != "exact" and stored != str(dtype).removeprefix("torch."):
        raise UserError(
            f"rewards.dtype={str(dtype).removeprefix('torch.')}: {CONVERTED} was converted for "
            f"{stored}; use that, or convert again without --dtype."
        )


def as_text(tree: Mapping[str, Any]) -> str:
    """A JSON object as a line of text, the same for equal content."""
    return json.dumps(tree, sort_keys=True)
