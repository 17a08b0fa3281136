"""Files of reward models: where they are, what they hold, their hash.

Nothing in them is ever executed.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.core.config import paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json as read_object
from fastgrpo.core.files import refuse_lfs_pointer, sha256


def locate(
    path: str | None, names: Sequence[str], beside: Sequence[str], where: str, remedy: str
) -> Path:
    """The file of a reward's weights.

    path: the file, or a folder or hub repository that has one of `names`, of which the first counts
    beside: further files that are fetched from the hub too, where it has them
    where: the setting, for messages
    Raises UserError, which ends with the remedy.
    """
    if path is None:
        raise UserError(f"{where}: missing; {remedy}.")
    given = Path(path)
    files = [given, *(given / name for name in names)]
    for file in [file for file in files if file.is_file()]:
        refuse_lfs_pointer(file, f"{where}={file}")
        return file
    if given.is_dir():
        raise UserError(f"{where}={path}: the folder has no {' or '.join(names)}; {remedy}.")
    if not paths.is_hub_id(path):
        raise UserError(f"{where}={path}: no such file or folder; {remedy}.")
    return _from_hub(path, names, beside=beside, where=where, remedy=remedy)


def _from_hub(
    path: str, names: Sequence[str], beside: Sequence[str], where: str, remedy: str
) -> Path:
    """The first of `names` in a hub repository, downloaded with the files beside it."""
    chosen, problem = None, "has none of the files"
    repository, revision = paths.hub_name(path)
    for name in (*names, *beside):
        if chosen is not None and name in names:
            continue
        try:
            file = Path(hf_hub_download(repository, name, revision=revision))
            chosen = file if name in names else chosen
        except EntryNotFoundError as error:  # also offline, for what is not in the cache
            problem = str(error).splitlines()[0]
        except (OSError, ValueError) as error:
            raise UserError(f"{where}={path}: {str(error).splitlines()[0]}; {remedy}.") from None
    if chosen is None:
        raise UserError(
            f"{where}={path}: neither a file or folder nor on the hub ({problem}); {remedy}."
        )
    return chosen


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch file by name, on the CPU.

    They may lie under "state_dict", and have any shape [...] and dtype.
    A torch file is read weights-only, so that it can run no code. Raises UserError naming the file.
    """
    refuse_lfs_pointer(file, f"rewards.path={file}")
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        problem = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"rewards.path={file}: damaged, or holds more than tensors ({problem[:120]}); download "
            "it again, or save its state_dict alone as a .safetensors file."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise UserError(f"rewards.path={file}: holds no state_dict; give the file of the weights.")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A config file beside the weights. Raises UserError where it is no JSON object."""
    return read_object(file, "rewards.path", "download it again")


def fingerprint(files: Sequence[Path], settings: Mapping[str, object]) -> str:
    """SHA-256 of the files' contents, in this order, and of the settings that change scores."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        total.update(bytes.fromhex(sha256(file)))
    return total.hexdigest()
