"""The folder of `distributed.offload_path`, and files in it that no crash leaves behind."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import refused

RECORD_BYTES = 64 * 2**20
"""Moments that are read or written at once, unless one shard's alone are more: large enough for
an NVMe's full speed, small enough that the buffers are little memory."""
BUFFERS = 3
"""Records in memory: one is read, one is stepped, one is written."""


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder that is not there, or that nothing can be written into.

    It is not made: where a disk is not mounted, that would be a folder on another one.
    """
    if not folder.is_dir():
        raise UserError(
            f"distributed.offload_path={folder}: no folder on this machine; make it on the node's "
            "NVMe, on every node."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"distributed.offload_path={folder}: no right to write there; correct that or name "
            "another folder."
        )


def open_file(folder: Path, size: int) -> IO[bytes]:
    """A file of so many bytes, all zero, whose space is taken and whose name is gone already.

    So the system frees its space however this process ends, and no write finds the disk full.
    Raises UserError where the folder or the disk refuses.
    """
    check_folder(folder)
    try:
        # open as long as the states live
        file = tempfile.TemporaryFile(dir=folder, prefix="fastgrpo-", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise refused(folder, "distributed.offload_path", error) from None
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise refused(folder, "distributed.offload_path", error) from None
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"distributed.offload_path={folder}: no room: a rank's masters and moments take "
            f"{size / 1e9:,.3f} GB, and {free / 1e9:,.3f} GB are free; free some, name another "
            "disk, or use more GPUs."
        ) from None
    return file
