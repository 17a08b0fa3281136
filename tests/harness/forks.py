"""`python -m MODULE`, alone or as torchrun's ranks, in processes forked from one that has imported
everything.

A run then costs its own work and not seconds of imports in each rank. What torchrun does is done
here in small: the ranks' environment, their death with their parent, and the end of all where one
fails. A few tests start the real ones.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from fastgrpo.core.processes import die_with, leave
from tests import ROOT

Completed = subprocess.CompletedProcess[str]
PATIENCE_S = 30.0  # torchrun's, between SIGTERM and SIGKILL for the other ranks of one that failed


@dataclass(frozen=True)
class Order:
    """What is to run."""

    module: str
    arguments: tuple[str, ...]
    ranks: int  # 0 = the command by itself, without torchrun
    environment: Mapping[str, str]
    output: Path
    errors: Path
    first: Callable[[int], None] | None  # called in each process with its rank, before all else


@dataclass(frozen=True)
class Started:
    """A run under way. Its process is the only one, or the parent of the ranks."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal's number; none = still running."""
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        """To the one process, or to the parent of the ranks; nothing where it has ended."""
        if self.poll() is None:
            _send({self.pid}, number)

    def kill(self) -> None:
        """By SIGKILL, and wait for the end."""
        self.send(signal.SIGKILL)
        self.process.join()

    def wait(self, timeout: float) -> int:
        """The exit code, at most `timeout` seconds later."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout:.0f} s")
        return self.process.exitcode


def start(
    module: str,
    arguments: Sequence[str],
    ranks: int = 0,
    output: Path = Path(os.devnull),
    errors: Path = Path(os.devnull),
    first: Callable[[int], None] | None = None,
) -> Started:
    """Start `python -m module` with these arguments, in this process's environment.

    module: or the path of a file, with a slash
    ranks: as many processes as torchrun would start; 0 = one, without torchrun
    first: called in each process with its rank, before all else; a function of a module, or a
    partial of one
    """
    order = Order(
        module,
        arguments=tuple(arguments),
        ranks=ranks,
        environment=dict(os.environ),
        output=output,
        errors=errors,
        first=first,
    )
    process = _server().Process(target=_lead, args=(order,))
    process.start()
    return Started(process)


def run(module: str, arguments: Sequence[str], ranks: int = 0, limit_s: float = 180.0) -> Completed:
    """Run to the end, whatever that is, with all that was said.  Raises TimeoutError"""
    with TemporaryDirectory(prefix="fork-") as folder:
        output, errors = Path(folder) / "out", Path(folder) / "err"
        code = start(module, arguments=arguments, ranks=ranks, output=output, errors=errors).wait(
            limit_s
        )
        return subprocess.CompletedProcess(
            [module, *arguments], code, output.read_text(), errors.read_text()
        )


def _server() -> ForkServerContext:
    """Python's own fork server; one for this process, started when first asked and ended with
    it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    return context


def _lead(order: Order) -> None:
    """In the forked process: run the command here, or fork its ranks and wait for them."""
    die_with(os.getppid())
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(order.environment)
    for file, descriptor in ((order.output, 1), (order.errors, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    if not order.ranks:
        _run(order, 0)
    port = _free_port()
    ranks = []
    for rank in range(order.ranks):
        child = os.fork()
        if child == 0:
            os.environ |= _variables(rank, order.ranks, port)
            _run(order, rank)
        ranks.append(child)
    os._exit(_wait(ranks))


def _run(order: Order, rank: int) -> NoReturn:
    """What `python -m module`, or `python file`, does."""
    code = 0
    sys.argv = [order.module, *order.arguments]
    if "torch" in sys.modules:
        # The fork left torch's pool of threads behind. The first call makes another one, and two
        # first calls at once, as of a library that reads weights in threads, find none.
        torch = sys.modules["torch"]
        torch.set_num_threads(torch.get_num_threads())
    try:
        if order.first is not None:
            order.first(rank)
        if "/" in order.module:
            runpy.run_path(order.module, run_name="__main__")
        else:
            runpy.run_module(order.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def _variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "forked",
    }
    return {name: str(value) for name, value in told.items()}


def _wait(ranks: list[int]) -> int:
    """0 once all have ended well; 1 after one has not, and the others are made to end."""
    left, failed, deadline = set(ranks), False, 0.0
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG if failed else 0)
        left.discard(pid)
        if pid and status and not failed:
            failed, deadline = True, time.monotonic() + PATIENCE_S
            _send(left, signal.SIGTERM)
        if failed and left:
            if time.monotonic() > deadline:
                _send(left, signal.SIGKILL)
            time.sleep(0.01)
    return int(failed)


def _send(processes: set[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
