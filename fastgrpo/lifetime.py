"""Processes that must not outlive others, how they end, and folders that only one run may use."""

import atexit
import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from fastgrpo.errors import UserError

PATIENCE_S = 10.0  # a killed run's other processes take a moment to go
LATE_S = 30.0  # for rank 0 to tell what is wrong


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


def after_rank_0(code: int) -> int:
    """`code`, late on ranks other than 0: torchrun ends them all once one has failed, and rank 0 tells why."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(LATE_S)
    return code


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
def only_run_in(folder: Path, key: str = "run.dir", doing: str = "training") -> Iterator[None]:
    """Hold the folder's lock; the kernel drops it however this process ends.

    Raises UserError, which names the recipe key and what the other does, where another process keeps holding it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_S
    with (folder / "lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{key}={folder}: another process is {doing} there; wait for it, stop it, or choose "
                        "another folder."
                    ) from None
                time.sleep(0.1)
        yield
