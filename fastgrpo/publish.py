"""Folders that appear whole or not at all: made under another name, flushed to disk and renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgrpo.errors import UserError
from fastgrpo.files import flush


@contextmanager
def whole_folder(folder: Path, option: str, replaces: str | None = None) -> Iterator[Path]:
    """Give the folder `folder`.partial to write into; where the body ends well it becomes `folder`, else it goes.

    option: what the user typed it after, for messages
    replaces: a file by which an existing folder is known to be an earlier one of these, which the new one replaces;
        none = an existing folder is refused
    Raises UserError where the folder exists or the disk refuses.
    """
    target = folder.resolve()
    partial, old = (target.with_name(target.name + ending) for ending in (".partial", ".replaced"))
    check_free(folder, option, replaces)
    try:
        for leftover in (partial, old):  # of a killed attempt
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise refused(folder, option, error) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_free(folder: Path, option: str, replaces: str | None) -> None:
    """Raise UserError where `folder` exists and is neither empty nor one that may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if replaces is None:
        raise UserError(f"{option}={folder}: exists already; choose another folder, or remove it first.")
    if not (folder / replaces).is_file():
        raise UserError(f"{option}={folder}: has no {replaces}, so it is not replaced; choose another folder.")


def refused(folder: Path, option: str, error: OSError) -> UserError:
    """The one line for what the operating system said against writing `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{option}={folder}: no space left on the disk; free some and start again.")
    return UserError(f"{option}={folder}: {error.filename}: {error.strerror}; choose another folder or correct that.")
