"""The processes that torchrun starts: what it says of each, starting them, and how they end.

RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are read here alone.
"""

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from fastgrpo.core.errors import UserError

LATE_S = 30.0  # for rank 0 to say what is wrong
SETTLED = "FASTGRPO_SETTLED"
"""Set in the environment once recipe and number of processes are checked, here or by _run.sh."""


class OneRankError(UserError):
    """A mistake that this rank alone meets and has printed: others may wait in a collective."""


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, in whatever way; on Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        sys.exit("the parent process is gone")


def die_with_torchrun() -> None:
    """Have this process, where torchrun started it, end with torchrun in whatever way.

    The processes of torchrun are no process group that is killed as one. To be called before the
    heavy imports: a process whose torchrun is killed earlier would go on without it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def rank() -> int:
    """Number of this process in the run, also before the ranks have met; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its node; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes in the run; 1 without torchrun."""
    return int(environment.get("WORLD_SIZE", "1"))


def local_world_size(unset: int = 1, environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes on this node; `unset` without torchrun."""
    return int(environment.get("LOCAL_WORLD_SIZE", unset))


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def processes_to_start(environment: Mapping[str, str]) -> int:
    """Number of processes that should take this one's place on this node; 1: it goes on as it is.

    More than 1 only for a lone process (WORLD_SIZE 1 or unset). Raises UserError where
    FASTGRPO_PROCESSES is not a positive number.
    """
    if world_size(environment) != 1:
        return 1
    wanted = environment.get("FASTGRPO_PROCESSES")
    if wanted is None:
        import torch

        return max(1, torch.cuda.device_count())
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(
            f"FASTGRPO_PROCESSES={wanted}: not a number of processes; use 1 or more, such as 8."
        )
    return int(wanted)


def torchrun_environment(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """The environment for a new torchrun, without what an outer torchrun put there."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    inner = {name: value for name, value in environment.items() if not name.startswith(outer)}
    threads = max(1, min(8, (os.cpu_count() or 1) // processes))
    inner.setdefault("OMP_NUM_THREADS", str(threads))
    return inner | {SETTLED: "1"}


def replace_by_torchrun(program: Sequence[str], processes: int) -> NoReturn:
    """Put a torchrun in this process's place.

    program: a file, or `-m` and a module, and its arguments
    """
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [*torchrun, *program], torchrun_environment(os.environ, processes))


def after_rank_0(code: int) -> int:
    """The exit code, late on ranks other than 0.

    torchrun ends all ranks once one has failed, and rank 0 says why.
    """
    if rank() != 0:
        time.sleep(LATE_S)
    return code


def fail_alone(message: str) -> NoReturn:
    """Print a message and raise OneRankError.

    Printed at once: what is closed on the error's way up may wait for the other ranks.
    """
    print(f"fastgrpo: rank {rank()}: {message}", file=sys.stderr, flush=True)
    raise OneRankError(message) from None


def leave(code: int) -> NoReturn:
    """End the process after its exit hooks, its output flushed, and the interpreter left as it is.

    A process group's thread that drops a Python object during the teardown aborts the process
    ("terminate called without an active exception"), so that a run that ended well, or with one
    clear line, would exit with SIGABRT.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
