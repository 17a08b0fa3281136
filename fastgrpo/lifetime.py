"""Processes that must not outlive others, how they end, and folders that only one run may use."""

import atexit
import ctypes
import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from fastgrpo.errors import UserError

PATIENCE_S = 10.0  # a killed run's other processes take a moment to go
LATE_S = 30.0  # for rank 0 to tell what is wrong
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems without file locks: Lustre mounted without `flock`, NFS without its lock service."""


class OneRankError(UserError):
    """A mistake that shows on this rank alone, which has told it: the others may wait for it inside a collective."""


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, in whatever way; on Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        sys.exit("the parent process is gone")


def die_with_torchrun() -> None:
    """As one of torchrun's processes, end with it in whatever way: they are no process group that is killed as one.

    To be called before the heavy imports: a process whose torchrun is killed earlier would go on without it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def rank() -> int:
    """This process's number among torchrun's, also before they have met; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def after_rank_0(code: int) -> int:
    """`code`, late on ranks other than 0: torchrun ends them all once one has failed, and rank 0 tells why."""
    if rank() != 0:
        time.sleep(LATE_S)
    return code


def fail_alone(message: str) -> NoReturn:
    """Raise OneRankError, and tell it at once: what is closed on its way up may wait for the other ranks."""
    print(f"fastgrpo: rank {rank()}: {message}", file=sys.stderr, flush=True)
    raise OneRankError(message) from None


def leave(code: int) -> NoReturn:
    """End the process with its exit hooks run and its output flushed, but without tearing the interpreter down.

    A process group's thread that drops a Python object during the teardown aborts the process ("terminate called
    without an active exception"), so that a run that ended well, or with one clear line, would exit with SIGABRT.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises UserError where another process keeps holding it."""
    deadline = time.monotonic() + PATIENCE_S
    while (lock := take_lock(folder, "run.dir")) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"run.dir={folder}: another process is training there; wait for it, stop it, or choose another folder."
            )
        time.sleep(0.1)
    with lock:
        yield


def take_lock(folder: Path, key: str) -> IO[str] | None:
    """The folder's lock, ours until it is closed or this process ends in whatever way; none where another has it.

    A file system without file locks gives it to everyone, with a line on stderr: it guards against a second run alone,
    and many clusters have no other place.  key: the recipe's, of the folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise
        print(
            f"fastgrpo: {key}={folder}: its file system has no file locks ({error.strerror}), so a second process "
            "there would not be noticed; start none, or have it mounted with them (Lustre: flock; NFS: lockd).",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return lock
