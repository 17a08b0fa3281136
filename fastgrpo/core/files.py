"""Files read as JSON, replaced as a whole, flushed to the disk, and hashed."""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastgrpo.core.errors import UserError

log = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises OSError, ValueError where the file is no JSON, TypeError where it is other JSON.
    """
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise TypeError(f"{file} is not a JSON object")
    return content


def nan_to_null(value: Any) -> Any:
    """The value with None for numbers that are not finite, at any depth, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: nan_to_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def null_to_nan(value: Any) -> Any:
    """The value with NaN for None, at any depth."""
    if isinstance(value, dict):
        return {key: null_to_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [null_to_nan(inner) for inner in value]
    return math.nan if value is None else value


def read_json(file: Path, where: str, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file holds none.

    where: the recipe key;  remedy: what to do
    """
    refuse_lfs_pointer(file, f"{where}: {file}")
    try:
        return load_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} cannot be read ({error}); {remedy}.") from None
    except TypeError:
        raise UserError(f"{where}: {file} is not a JSON object; {remedy}.") from None


def read_json_or_none(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is missing, damaged or holds something else."""
    try:
        return load_json(file)
    except (OSError, ValueError, TypeError):
        return None


def read_secret(file: Path, where: str, what: str) -> str:
    """A token or key in a file. Raises UserError where a header cannot carry the content.

    where: the key or option that names the file;  what: what it holds, for messages
    """
    try:
        secret = file.read_text().strip()
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        raise UserError(f"{where}={file}: {error.strerror}; write {what} into it.") from None
    except UnicodeDecodeError:
        secret = ""
    check_secret(secret, f"{where}={file}")
    if mode & 0o077:
        may = "read and change" if mode & 0o022 else "read"
        log.warning(
            "%s=%s: others on this machine may %s it (mode %o); run chmod 600 on it",
            where,
            file,
            may,
            mode,
        )
    return secret


def check_secret(secret: str, where: str) -> None:
    """Raise UserError, which does not quote it, for a token or key that no header can carry."""
    if not secret or not secret.isascii() or not secret.isprintable():
        raise UserError(f"{where}: no usable token in it; write one line of printable characters.")


def is_lfs_pointer(file: Path) -> bool:
    """Whether git-lfs left a pointer in the file's place. Raises OSError."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_lfs_pointer(file: Path, where: str) -> None:
    """Raise UserError for a pointer of git-lfs; what cannot be read is told by who reads it.

    where: the key and the file, for the message
    """
    with suppress(OSError):
        if is_lfs_pointer(file):
            raise UserError(
                f"{where}: is a pointer of git-lfs and not the file; get it with git lfs pull."
            )


def replace_text(file: Path, text: str, on_disk: bool = False) -> None:
    """Replace a UTF-8 file as a whole, see `replacing`.  on_disk: wait until the disk has it"""
    with replacing(file, on_disk) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_bytes(file: Path, content: bytes, on_disk: bool = False) -> None:
    """Replace a file as a whole, see `replacing`.  on_disk: wait until the disk has it"""
    with replacing(file, on_disk) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(file: Path, on_disk: bool = False) -> Iterator[Path]:
    """Give a path to write; where the body ends well that file takes the place of `file`.

    A kill or an OSError, which is raised, leaves the old file or the new one. Of several processes
    that do so at once, on any machine, the last one's is left.
    """
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if on_disk:
            flush(partial)
        os.replace(partial, file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if error.filename == str(partial):  # a name that nobody knows
            error.filename, error.filename2 = str(file), None
        raise


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_link(path: str, flags: int) -> int:
    """For `open(..., opener=no_link)`: of a link, which may lead out of the folder, an OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def open_to_append(file: Path) -> IO[str]:
    """Open a text file of a run's folder to append to it; of a link an OSError."""
    descriptor = no_link(str(file), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return os.fdopen(descriptor, "a", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; what a link names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def problem_of(error: OSError) -> str:
    """What the operating system said, in one line, with the file where it names one."""
    said = error.strerror or type(error).__name__
    return f"{error.filename}: {said}" if error.filename else said


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


PATIENCE_S = 10.0  # a killed run's other processes take a moment to go
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems without locks: Lustre without `flock`, NFS without its lock service."""


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises UserError where another process keeps holding it."""
    deadline = time.monotonic() + PATIENCE_S
    while (lock := take_lock(folder, "run.dir")) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"run.dir={folder}: another process is training there; wait for it, stop it, or "
                "choose another folder."
            )
        time.sleep(0.1)
    with lock:
        yield


def take_lock(folder: Path, key: str) -> IO[str] | None:
    """The lock of a folder, until it is closed or this process ends; None where another has it.

    A file system without file locks gives the lock to everyone, with a line on stderr: the lock
    guards against a second run alone, and many clusters have no other place.
    key: the recipe's, of the folder
    """
    try:
        make_folder(folder)
        lock = open_to_append(folder / "lock")
    except IsADirectoryError:
        raise UserError(f"{key}={folder}: lock is a folder there; remove it.") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(f"{key}={folder}: lock is no plain file there; remove it.") from None
        raise refused(folder, key, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise
        message = (
            f"fastgrpo: {key}={folder}: its file system has no file locks ({error.strerror}), so a "
            "second process there would not be noticed; start none, or have it mounted with them "
            "(Lustre: flock; NFS: lockd)."
        )
        print(message, file=sys.stderr, flush=True)
    if not _is_still(folder / "lock", lock):  # a run that never began has removed it meanwhile
        lock.close()
        return None
    return lock


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Where one cannot be made, an OSError leaves none behind."""
    above = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        for one in above:
            with suppress(OSError):
                one.rmdir()
        raise


def _is_still(file: Path, opened: IO[str]) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def whole_folder(folder: Path, option: str, replaces: str | None = None) -> Iterator[Path]:
    """Give the folder `folder`.partial to write into.

    Where the body ends well the folder gets its name, else it is removed.

    option: what the user typed before the folder, for messages
    replaces: a file by which an existing folder is known to be an earlier one of these, which the
        new one replaces; None: an existing folder is refused
    Raises UserError where the folder exists or the disk refuses.
    """
    target = Path(os.path.realpath(folder))
    partial, old = (target.with_name(target.name + ending) for ending in (".partial", ".replaced"))
    try:
        check_free(folder, option, replaces)
        for leftover in (partial, old):  # of a killed attempt
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(partial)
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
    """Raise UserError where `folder` exists and is neither empty nor one that may be replaced.

    An OSError: it is no path on this machine.
    """
    try:
        os.stat(folder)
    except FileNotFoundError:
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if replaces is None:
        raise UserError(
            f"{option}={folder}: exists already; choose another folder, or remove it first."
        )
    if not (folder / replaces).is_file():
        raise UserError(
            f"{option}={folder}: has no {replaces}, so it is not replaced; choose another folder."
        )


def refused(folder: Path, option: str, error: OSError) -> UserError:
    """The one-line error for what the operating system said against writing `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{option}={folder}: no space left on the disk; free some and start again."
        )
    beside = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
    return UserError(
        f"{option}={folder}: {beside}{error.strerror}; choose another folder or correct that."
    )
