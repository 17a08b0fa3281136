"""Stopping in good order: all ranks agree, and only between two pieces of work.

SIGUSR1, slurm's warning before a time limit, SIGTERM, and SIGHUP, which comes as a terminal goes
away, set a flag and nothing else; the file `stop` in the run's folder does the same. Before each
batch of a rollout or evaluation, and before each micro-batch until an iteration's first optimizer
step, the ranks agree whether to stop. What was begun is then dropped: it is keyed, so that the next
start draws it again exactly. After the first optimizer step the iteration is finished first. So
what is saved lies between two iterations.

torchrun passes no exit code on, so that the file `requeue` tells the batch script of a slurm job
what to do next: go on where slurm asked, by a signal or by its word in the file, and not where a
person made the file.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from fastgrpo.core.files import replace_text, take_lock
from fastgrpo.parallel.world import World

T = TypeVar("T")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)  # the last: its terminal went away
POLL_S = 1.0  # between two looks for the file, which may lie on a network file system
ANSWER = "requeue"
SLURM = "slurm"
"""What the batch script, launch/_job.sh, writes into the file `stop`."""
BATCH = "FASTGRPO_BATCH"
"""Set by the batch script, launch/_job.sh, which has removed what an earlier attempt left."""


class Stopped(Exception):
    """Raised on every rank at once, between two pieces of work, where a rank was asked to stop."""


class Signals:
    """Remembers SIGNALS inside the context, which only the main thread can enter.

    Those that are ignored, as SIGHUP is under nohup, stay so.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in heard}
        # launch.py holds back what comes before this
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class Stop:
    """Whether this run was asked to stop, and what becomes of it; every rank has one."""

    def __init__(self, folder: Path, signals: Signals, world: World) -> None:
        """Forget what an earlier attempt left in `folder`, whose lock this run must hold.

        On every rank.
        """
        self.file, self.answer = folder / "stop", folder / ANSWER
        self.signals, self.world = signals, world
        # On the hosts: a GPU's queue of kernels is not waited for.
        self._group = dist.new_group(backend="gloo") if world.device.type == "cuda" else None
        self._polled = -POLL_S
        if BATCH not in os.environ:
            world.on_main(self._forget)

    def _forget(self) -> None:
        self.file.unlink(missing_ok=True)
        self.answer.unlink(missing_ok=True)

    def poll_before(self, work: Iterable[T]) -> Iterator[T]:
        """The pieces of work, one by one.

        Raises Stopped, on every rank, before a piece where any rank was asked to stop. The ranks
        agree while a piece is under way and read the answer before the next, so that none waits for
        another's piece. Ranks may have different numbers of pieces, also no piece: all return when
        all are done.
        """
        agreement = None
        for piece in work:
            if agreement is not None:
                self._answer(agreement)
            agreement = self._ask(busy=True)
            yield piece
        if agreement is not None:
            self._answer(agreement)
        while self._answer(self._ask(busy=False)):
            pass

    def _ask(self, busy: bool) -> tuple[Any, torch.Tensor]:
        """Begin an agreement, uint8 [2]: was any rank asked to stop, and is any busy."""
        flags = torch.tensor([self._wanted(), busy], dtype=torch.uint8)
        return dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True), flags

    def _answer(self, agreement: tuple[Any, torch.Tensor]) -> bool:
        """Whether any rank is busy; raises Stopped where any was asked to stop.

        agreement: the collective under way, and its flags, uint8 [2]
        """
        under_way, flags = agreement
        under_way.wait()
        stop, any_busy = flags.tolist()
        if stop:
            raise Stopped
        return bool(any_busy)

    def _wanted(self) -> bool:
        if (
            self.world.main
            and not self.signals.received
            and time.monotonic() - self._polled >= POLL_S
        ):
            self._polled = time.monotonic()
            return self.file.exists()
        return self.signals.received

    def tell(self) -> None:
        """Answer the batch script after Stopped: requeue the job, unless a person stopped it."""
        if self.world.main:
            with contextlib.suppress(OSError):
                person = (
                    self.file.exists() and self.file.read_text(errors="replace").strip() != SLURM
                )
                self.file.unlink(missing_ok=True)
                answer(self.answer.parent, requeue=not person)


def answer(folder: Path, requeue: bool) -> None:
    """Tell the batch script what becomes of the job.  folder: of a run whose lock is held"""
    with contextlib.suppress(OSError):  # without an answer the job counts as crashed
        replace_text(folder / ANSWER, "yes\n" if requeue else "no\n")


def answer_mistake(folder: Path) -> None:
    """Tell the batch script not to requeue, since a person must look at the mistake first.

    On the main rank, once it has let go of the lock. Where another run has the lock, the folder and
    its answer are that run's. Where there is no folder none is made: the batch script, which would
    read the answer, has made it.
    """
    with contextlib.suppress(OSError):  # also of a path that cannot be
        if not folder.is_dir():
            return
        lock = take_lock(folder, "run.dir")
        if lock is not None:
            with lock:
                answer(folder, requeue=False)
