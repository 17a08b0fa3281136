"""The processes that torchrun starts: what it says of each, starting them, and how they end.

RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are read here alone. Schedulers set the first two
in a container's environment, too, for a torchrun to come: a process is a rank where it is also told
its number on the node, or where the ranks meet.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fastgrpo.core.errors import UserError

LATE_S = 30.0  # for rank 0 to say what is wrong
ON_THIS_MACHINE = ("--standalone", "--local-addr=127.0.0.1")
"""Options of torchrun: the machine's own name, by which ranks would meet, need not resolve."""
SETTLED = "FASTGRPO_SETTLED"
"""Set in the environment once recipe and number of processes are checked, here or by _run.sh."""
SPOKEN_FOR = "FASTGRPO_SPOKEN_FOR"
"""Set for the ranks by cli/launch.py, which says in one line how they ended."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
ONE_PRESS_S = 1.0  # Ctrl-C reaches a rank twice: from the terminal, and from torchrun


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
    return _number("RANK", 0, os.environ)


def local_rank() -> int:
    """Number of this process on its node; 0 without torchrun."""
    return _number("LOCAL_RANK", 0, os.environ)


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes in the run; 1 without torchrun."""
    return _number("WORLD_SIZE", 1, environment)


def local_world_size(unset: int = 1, environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes on this node; `unset` without torchrun."""
    return _number("LOCAL_WORLD_SIZE", unset, environment)


def under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or another launcher that knows where the ranks meet, started this one."""
    if not all(environment.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE")):
        return False
    return "LOCAL_RANK" in environment or {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys()


def _number(name: str, unset: int, environment: Mapping[str, str]) -> int:
    """What torchrun says of this process; `unset` where no launcher started it."""
    value = environment.get(name, "")
    return int(value) if value.isdecimal() and under_torchrun(environment) else unset


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
    root = str(Path(__file__).resolve().parents[2])  # the package need not be installed
    inner["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return inner | {SETTLED: "1"}


def torchrun_command(program: Sequence[str], processes: int) -> list[str]:
    """argv of a torchrun on this machine alone.

    program: a file, or `-m` and a module, and its arguments
    """
    torchrun = [sys.executable, "-m", "fastgrpo.cli.launch", *ON_THIS_MACHINE]
    return [*torchrun, f"--nproc-per-node={processes}", *program]


def replace_by_torchrun(program: Sequence[str], processes: int) -> NoReturn:
    """Put a torchrun in this process's place.  program: as of `torchrun_command`"""
    command = torchrun_command(program, processes)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, torchrun_environment(os.environ, processes))


def after_rank_0(code: int) -> int:
    """The exit code, late on ranks other than 0.

    torchrun ends all ranks once one has failed, and rank 0 says why.
    """
    if rank() != 0:
        time.sleep(LATE_S)
    return code


def tell_torchrun(message: str) -> None:
    """Have torchrun's report of failures end with a message, where torchrun started this rank."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}))


def fail_alone(message: str) -> NoReturn:
    """Print a message and raise OneRankError.

    Printed at once: what is closed on the error's way up may wait for the other ranks.
    """
    print(f"fastgrpo: rank {rank()}: {message}", file=sys.stderr, flush=True)
    tell_torchrun(f"fastgrpo: rank {rank()}: {message}")
    raise OneRankError(message) from None


class CtrlC:
    """Ctrl-C as KeyboardInterrupt, once; a second press ends the process where it stands.

    In what is torn down or imported meanwhile the interrupt may surface as another error, or be
    printed as "ignored": `received` tells, and nothing else is printed.
    """

    def __init__(self) -> None:
        """Hear Ctrl-C from now on; not where it is ignored, as in a shell's background."""
        self.received = 0.0
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)

    def forget(self) -> None:
        """Leave Ctrl-C to whoever hears it next."""
        if signal.getsignal(signal.SIGINT) == self._hear:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def end_at_once(self, line: str) -> None:
        """Let a press from now on end the process where it stands: it is ending anyway.

        line: what a press says that is the first; empty: nothing
        """

        def end(number: int, frame: FrameType | None) -> None:
            if not self.received:
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())
            os._exit(INTERRUPTED)

        if signal.getsignal(signal.SIGINT) == self._hear:
            signal.signal(signal.SIGINT, end)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self.received > ONE_PRESS_S:
                os._exit(INTERRUPTED)
            return
        self.received = time.monotonic()
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
        raise KeyboardInterrupt


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
