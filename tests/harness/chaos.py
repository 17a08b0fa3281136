"""Killing ranks from within at chosen moments, and what a kill must leave of the checkpoints."""

import hashlib
import importlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from fastgrpo.checkpoint import reader
from fastgrpo.core.files import sha256

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class InFile:
    """The n-th time that a rank is about to do something with the files of the checkpoints."""

    # regular expression of "mkdir PATH", "write PATH", "read PATH", "rename FROM TO", "remove NAME"
    operation: str
    count: int = 1


@dataclass(frozen=True)
class InCall:
    """So many seconds after the n-th call of a function has begun, whatever the rank is doing
    then.
    """

    function: str  # module:Class.name
    count: int = 1
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        """Raise AttributeError here where there is no such function: in a rank it would end the
        rank, as the kill does.
        """
        owner, name = _owner(self.function)
        getattr(owner, name)


def lay_mine(moment: InFile | InCall, whose: int, rank: int) -> None:
    """Have the process kill itself by SIGKILL at that moment, if it is the rank that is meant."""
    if rank == whose:
        _watch_files(moment) if isinstance(moment, InFile) else _wrap(moment)


def mine(moment: InFile | InCall, rank: int) -> Callable[[int], None]:
    """For `forks.start`."""
    return partial(lay_mine, moment, rank)


def fail(error: type[Exception], function: str, whose: int, folder: Path, rank: int) -> None:
    """Have a function raise an error at its first call on one rank, under NCCL's rule.

    That rule: `dist.destroy_process_group` returns once all ranks have called it.
    folder: where ranks note that they have
    """
    real_destroy = dist.destroy_process_group

    def destroy(group: dist.ProcessGroup | None = None) -> None:
        (folder / f"destroyed-{rank}").touch()
        while len(list(folder.glob("destroyed-*"))) < dist.get_world_size():
            time.sleep(0.05)
        real_destroy(group)

    def planted(*arguments: Any, **named: Any) -> NoReturn:
        raise error("planted on one rank")

    dist.destroy_process_group = destroy
    if rank == whose:
        owner, name = _owner(function)
        setattr(owner, name, planted)


def _owner(function: str) -> tuple[Any, str]:
    """The object that has a function, and the function's name there.  function: module:Class.name"""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def _watch_files(moment: InFile) -> None:
    left, pattern = moment.count, re.compile(moment.operation)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        told = _operation(event, arguments)
        if told is not None and pattern.search(told):
            left -= 1
            if left == 0:
                die()

    sys.addaudithook(hook)


def _operation(event: str, arguments: tuple[Any, ...]) -> str | None:
    """What Python is about to do, in words; none = not with files."""
    if event == "open":
        path, _, flags = arguments
        return f"{'write' if flags & WRITES else 'read'} {path}"
    if event in ("os.mkdir", "os.remove", "os.rmdir"):
        return f"{event.removeprefix('os.')} {arguments[0]}"
    if event == "os.rename":
        return f"rename {arguments[0]} {arguments[1]}"
    return None


def _wrap(moment: InCall) -> None:
    owner, name = _owner(moment.function)
    real, left = getattr(owner, name), moment.count

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            timer = threading.Timer(moment.delay_s, die)
            timer.daemon = True
            timer.start()
        return real(*arguments, **named)

    setattr(owner, name, called)


def published(folder: Path) -> dict[int, dict[str, str]]:
    """SHA-256 of each tensor's bytes in each published checkpoint, all of which must be whole, as
    must what `latest` names.
    """
    found = {}
    for path in sorted(folder.glob("checkpoints/step-*")):
        if path.suffix == ".partial":
            continue
        assert path.name[5:].isdecimal(), f"{path.name}: a kill has damaged it"
        assert reader.wrong_size(path) is None
        entries = reader.manifest(path)
        hashes = {
            file.name: sha256(file) for file in path.iterdir() if file.name != "manifest.json"
        }
        assert hashes == {name: entry["sha256"] for name, entry in entries.items()}, path
        found[reader.number(path)] = _contents(path)
    latest = folder / "checkpoints" / "latest"
    if latest.exists():
        assert reader.number(Path(latest.read_text().rstrip("\n"))) in found
    else:
        assert len(found) <= 1, "only the first checkpoint is there without `latest` for a moment"
    return found


def _contents(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name and place.

    Not of the files: torch writes what it reads from a GPU in another order than what was staged.
    """
    files = {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}
    found = {}
    for index, at in FileSystemReader(checkpoint).read_metadata().storage_data.items():
        content = files[at.relative_path][at.offset : at.offset + at.length]
        found[str(index)] = hashlib.sha256(content).hexdigest()
    return found
