"""Room on the disk for a checkpoint, measured before it is written."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

HEADER_BYTES = 2048  # of each tensor in a part, and its entry in the metadata
SPARE_BYTES = 2**20  # left for the run's other files


def bytes_of(state: dict[str, Any], ranks: int) -> int:
    """Bytes that a checkpoint takes at most, about, with a header for each part of a tensor."""
    tensors: list[Tensor] = []

    def walk(node: object) -> None:
        if isinstance(node, Tensor):
            tensors.append(node)
        elif isinstance(node, dict):
            for value in node.values():
                walk(value)

    walk(state)
    return sum(tensor.numel() * tensor.itemsize + ranks * HEADER_BYTES for tensor in tensors)


def fresh_folder(folder: Path, needed: int) -> str | None:
    """Make an empty folder for so many bytes.

    returns what is wrong where the disk has no room for them
    Measured before and not by writing: a save in the background would leave the run's other files
    no room either.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed + SPARE_BYTES:
        sizes = f"it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        return f"No space left on device: {sizes}"
    folder.mkdir()
    return None
