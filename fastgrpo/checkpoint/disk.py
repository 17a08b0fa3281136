"""The folder of checkpoints on the disk: swept, made room in, pruned."""

import errno
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgrpo.checkpoint.reader import published
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import problem_of, remove, replace_text, sha256

HEADER_BYTES = 2048  # of each tensor in a part, and its entry in the metadata
SPARE_BYTES = 2**20  # left for the run's other files


def sweep(folder: Path) -> None:
    """Make the folder of checkpoints, and remove what a killed save left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in (*folder.glob("step-*.partial"), *folder.glob("latest.*.partial")):
            remove(partial)
        if (folder / "latest").is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(folder / "latest"))
    except OSError as error:
        raise UserError(
            f"run.dir={folder.parent}: checkpoints cannot be kept there ({problem_of(error)}); "
            "correct or remove that."
        ) from None


def bytes_of(state: Mapping[str, Any], ranks: int) -> int:
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


def fresh(folder: Path, needed: int) -> str | None:
    """Make an empty folder for so many bytes.

    returns what is wrong where the disk refuses, or has no room for them
    Measured before and not by writing: a save in the background would leave the run's other files
    no room either.
    """
    try:
        remove(folder)
        folder.parent.mkdir(exist_ok=True)  # no parents: a run's folder that is gone stays gone
        free = shutil.disk_usage(folder.parent).free
        if free < needed + SPARE_BYTES:
            sizes = f"it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
            return f"No space left on device: {sizes}"
        folder.mkdir()
    except OSError as error:
        return problem_of(error)
    return None


def hashes(files: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of each file, by its name."""
    return {file.name: (file.stat().st_size, sha256(file)) for file in files}


def name_latest(folder: Path, newest: Path | None) -> None:
    """Have `latest` name the newest checkpoint, and be gone where there is none.

    A run killed between a checkpoint's rename and this, or one whose newest was set aside, leaves
    the name of one that is older, or that the next pruning removes.
    """
    file = folder / "latest"
    if newest is None:
        file.unlink(missing_ok=True)
        return
    text = f"{newest.name}\n"
    with suppress(FileNotFoundError):
        if file.read_bytes() == text.encode():
            return
    replace_text(file, text, on_disk=True)


def prune(folder: Path, keep: int, kept: Container[str]) -> None:
    """Remove all checkpoints but the newest ones, and those that are kept for what they are."""
    for path in published(folder)[keep:]:
        if path.name not in kept:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, renamed first: a half-removed folder must not look whole."""
    doomed = path.with_suffix(".partial")
    os.rename(path, doomed)
    remove(doomed)


def set_aside(path: Path, aside: Path) -> None:
    """Rename a damaged checkpoint; an earlier one of that name goes."""
    remove(aside)
    os.rename(path, aside)
