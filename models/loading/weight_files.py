"""The folder of one network in the diffusers layout: its configuration, and which of its files
holds which tensor.

The weights are one .safetensors file, or several with an index, of the variant that the folder is
read by where there are such (`source.Folder`). They are mapped into memory and not read: what is
taken of a tensor comes from the disk, and nothing else does. Pickles (.bin) are refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.core import files
from fastgrpo.core.errors import UserError
from fastgrpo.models.loading.source import Folder

WEIGHTS = "diffusion_pytorch_model"
STEMS = (WEIGHTS, "model")  # of the files of diffusers' networks and of transformers'
PICKLES = (f"{WEIGHTS}*.bin", "pytorch_model*.bin")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and what it is there."""

    file: Path
    key: str
    shape: torch.Size
    dtype: torch.dtype


def read_json(file: Path) -> dict[str, Any]:
    """A config file of the folder. Raises UserError where it is no JSON object."""
    return files.read_json(file, "model.path", "download that folder again")


def check_class(kind: Any, folder: Path) -> None:
    """Raise UserError where the folder's config names another class than `kind`."""
    named = read_json(folder / "config.json").get("_class_name", kind.__name__)
    if named != kind.__name__:
        raise UserError(
            f"model.path: {folder} holds a {named}, not a {kind.__name__}; correct model.family or "
            "the path."
        )


def refuse_pointers(folder: Path) -> None:
    """Raise UserError where git-lfs left a pointer in place of a file of the folder."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            files.refuse_lfs_pointer(file, f"model.path: {file}")


def check_shards(folder: Path) -> None:
    """Raise UserError where a file is missing that the index of the weights names, or a pointer of
    git-lfs lies in its place, and where all weights are pickles or another variant.
    """
    refuse_pointers(folder)
    entry = _entry(folder)
    if entry is None:
        _refuse_others(folder)
        return
    for file in _parts(entry):
        if not file.is_file():
            raise UserError(
                f"model.path: {file} is missing, a part of the weights; download it again."
            )


def _entry(folder: Path) -> Path | None:
    """The file by which the weights are read: an index, or the only one. None: there is none."""
    variants = [""] if (own := _asked(folder)) is None else [f".{own}", ""]
    return next(
        (
            file
            for variant in variants
            for stem in STEMS
            for name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors")
            if (file := folder / name).is_file()
        ),
        None,
    )


def _asked(folder: Path) -> str | None:
    return folder.variant if isinstance(folder, Folder) else None


def _parts(entry: Path) -> list[Path]:
    """The files of weights."""
    if entry.suffix != ".json":
        return [entry]
    return [entry.with_name(part) for part in sorted({*read_json(entry)["weight_map"].values()})]


def read_variant(folder: Path) -> str | None:
    """The variant by which a folder's weights are read: the one asked for, where it has that."""
    own, entry = _asked(folder), _entry(folder)
    found = entry is not None and own is not None and f".{own}." in entry.name
    return own if found else None


def plainly_named(folder: Path) -> dict[Path, str]:
    """The files of a part as they are copied, by the names that a reader finds without a variant.

    Of weights only those that are read.
    """
    entry, kept = _entry(folder), {}
    weights = [] if entry is None else [entry, *_parts(entry)]
    for file in sorted(folder.iterdir()):
        other = any(file.match(p) for p in (*PICKLES, *(f"{stem}*.safetensors*" for stem in STEMS)))
        if file.is_file() and (entry is None or not other or file in weights):
            kept[file] = file.name
    if entry is not None and (variant := read_variant(folder)) is not None:
        kept[entry] = entry.name.replace(f".{variant}.", ".")
    return kept


def _refuse_others(folder: Path) -> None:
    """Raise UserError for a folder whose only weights are of another variant, or pickles."""
    variants = [file for stem in STEMS for file in sorted(folder.glob(f"{stem}.*.safetensors*"))]
    if variants and (named := _variant_in(variants[0].name)):
        raise UserError(
            f"model.path: {folder} has its weights only as a variant ({variants[0].name}); set "
            f"model.variant={named}."
        )
    pickles = [file for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        config = files.read_json_or_none(folder / "config.json") or {}
        library, kind = "diffusers", config.get("_class_name")
        if kind is None:
            library, kind = "transformers", (config.get("architectures") or ["AutoModel"])[0]
        raise UserError(
            f"model.path: {folder} has its weights only as {pickles[0].name}, a pickle, which is "
            f'not read; convert them once: python -c "import {library}; '
            f"{library}.{kind}.from_pretrained('{folder}').save_pretrained('{folder}')\"."
        )


def _variant_in(name: str) -> str:
    """The variant in the name of a file of weights: model.fp16.safetensors, also of its parts."""
    found = re.search(
        r"\.(?!safetensors|index)([A-Za-z_]\w*)(-\d+-of-\d+)?\.(safetensors|json)", name
    )
    return "" if found is None else found[1]


def check_weights(folder: Path) -> None:
    """Raise UserError where a diffusers network's weights are not all there, by their names."""
    check_shards(folder)
    for file in _weight_files(folder):
        if not file.is_file():
            raise UserError(f"model.path: {file} is missing, a part of the weights.")


def tensors(folder: Path) -> dict[str, Place]:
    """Every tensor of a diffusers network's folder, by its name in the files.

    Raises UserError for a part that is missing or damaged, and for a folder without weights.
    """
    check_shards(folder)
    return {
        key: Place(file, key, tensor.shape, tensor.dtype)
        for file in _weight_files(folder)
        for key, tensor in mapped(file).items()
    }


def _weight_files(folder: Path) -> list[Path]:
    entry = _entry(folder)
    if entry is None:
        raise UserError(
            f"model.path: {folder} has no {WEIGHTS}.safetensors; download that folder again."
        )
    return _parts(entry)


def mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, each of its shape [...], on the CPU, mapped into memory.

    The mapping goes with the last of the tensors.

    Raises UserError for a damaged file.
    """
    try:
        return load_file(file)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problem = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        problem = problem.split(". ")[0]  # what follows is advice to programmers
        raise UserError(
            f"model.path: {file} cannot be read ({problem}); download that folder again."
        ) from None


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor [...] in another precision.

    Raises UserError where a value is not finite there.
    """
    result = tensor.to(dtype)
    if not (dtype.is_floating_point and tensor.numel()):
        return result
    if torch.isfinite(torch.stack(result.aminmax())).all():
        return result
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise UserError(
            f"checkpoint: {name} is not finite: the weights are damaged or have exploded; choose "
            "another --step."
        )
    kind = str(dtype).removeprefix("torch.")
    raise UserError(
        f"--dtype={kind}: {name} has values up to {tensor.abs().max().item():.3g}, which are "
        f"infinite in {kind}; use --dtype {'float32' if dtype == torch.bfloat16 else 'bfloat16'}."
    )
