"""The folder of one network in the diffusers layout: its configuration, and which of its files
holds which tensor.

The weights are one .safetensors file, several with an index, or one .bin file where there is no
other. They are mapped into memory and not read: what is taken of a tensor comes from the disk, and
nothing else does.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.core import files
from fastgrpo.core.errors import UserError

WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
INDEXES = (INDEX, "model.safetensors.index.json")  # of diffusers' networks and of transformers'


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
    git-lfs lies in its place.
    """
    refuse_pointers(folder)
    for index in (folder / name for name in INDEXES):
        if index.is_file():
            for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                if not (folder / shard).is_file():
                    raise UserError(
                        f"model.path: {folder / shard} is missing, a part of the weights; download "
                        "it again."
                    )
    if not _has_weights(folder) and (variant := _variant(folder)) is not None:
        raise UserError(
            f"model.path: {folder} has its weights only as a variant ({variant.name}), which is "
            "not read; save or download that folder without variant=..."
        )


def check_weights(folder: Path) -> None:
    """Raise UserError where a diffusers network's weights are not all there, by their names."""
    check_shards(folder)
    for file in _weight_files(folder):
        if not file.is_file():
            raise UserError(f"model.path: {file} is missing, a part of the weights.")


def _has_weights(folder: Path) -> bool:
    """Whether the folder has weights under the names that diffusers and transformers read."""
    plain = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", "model.safetensors", "pytorch_model.bin")
    return any((folder / name).is_file() for name in (*plain, *INDEXES))


def _variant(folder: Path) -> Path | None:
    """A file of weights that was saved with variant="fp16" or another; None: there is none."""
    stems = (WEIGHTS, "model", "pytorch_model")
    files = (file for stem in stems for file in sorted(folder.glob(f"{stem}.*.*")))
    return next((file for file in files if file.suffix in (".safetensors", ".bin")), None)


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
    if (folder / INDEX).is_file():
        return [
            folder / part
            for part in sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        ]
    for file in (folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"):
        if file.is_file():
            return [file]
    raise UserError(
        f"model.path: {folder} has no {WEIGHTS}.safetensors; download that folder again."
    )


def mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, each of its shape [...], on the CPU, mapped into memory.

    The mapping goes with the last of the tensors.

    Raises UserError for a damaged file, and for a .bin in torch's format of before 2020, which
    cannot be mapped.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict) or not all(
            isinstance(value, Tensor) for value in content.values()
        ):
            raise ValueError("not a mapping of tensors")
        return content
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
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
