"""Processes that must not outlive others, how they end, and folders that only one run may use."""

import atexit
import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

from fastgrpo.core.errors import UserError

LATE_S = 30.0  # for rank 0 to tell what is wrong


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
