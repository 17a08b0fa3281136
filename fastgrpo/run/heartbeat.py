"""Heartbeats: a small file per rank says where the rank is, so that a run that hangs shows where.

The thread that trains only changes the heartbeat in memory; another thread writes the file. No
torch here: `fastgrpo status` reads the files on a login node.
"""

import json
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from fastgrpo.core.files import load_json, no_link, remove

FOLDER = "heartbeats"
INTERVAL_S = 3.0  # at the latest
SHORTEST_S = 0.5  # between two writes, however often the phase changes
SIZE = 1024  # bytes of a file, always the same: it is overwritten in place, on a full disk too
WAIT = "wait"
"""The phase in which a rank has done its part and waits for others'."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The state of one rank, as its file has it."""

    rank: int
    ranks: int
    host: str
    pid: int
    iteration: int = 0  # from 0
    phase: str = "start"
    laps: int = 0  # phases that this rank has ended in this iteration
    phase_s: float = 0.0  # since the phase was entered, when this was written
    longest_s: float = 0.0  # the longest that this phase lasted before; 0 = not ended yet
    time: float = 0.0  # when this was written, seconds since 1970
    at: str = ""  # what the main thread runs: module:line function, innermost first
    end: str = ""  # "done", or the error, once this rank has left the run


class HeartbeatWriter:
    """Writes run_dir/heartbeats/rank-N at each change of phase and every three seconds.

    A context manager: on leaving it the file says how the rank ended. A change of phase is written
    within half a second. An OSError, as of a full disk, is passed over; the next beat tries again.
    """

    def __init__(
        self, run_dir: Path, rank: int, ranks: int, interval_s: float = INTERVAL_S
    ) -> None:
        self.file = run_dir / FOLDER / f"rank-{rank}"
        self.interval_s = interval_s
        self.written = 0  # files written so far
        self._beat = Heartbeat(rank=rank, ranks=ranks, host=node(), pid=os.getpid())
        self._entered = time.monotonic()
        self._longest: dict[str, float] = {}
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self._changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def phase(self) -> str:
        """The phase that this rank is in."""
        return self._beat.phase

    def enter(self, phase: str, iteration: int | None = None) -> None:
        """Note that this rank begins a phase, the first of an iteration where one is given."""
        now = time.monotonic()
        with self._lock:
            before = self._beat
            self._longest[before.phase] = max(
                self._longest.get(before.phase, 0.0), now - self._entered
            )
            self._entered = now
            self._beat = replace(
                before,
                phase=phase,
                iteration=before.iteration if iteration is None else iteration,
                laps=before.laps + 1 if iteration is None else 0,
                longest_s=self._longest.get(phase, 0.0),
            )
        self._changed.set()

    def __enter__(self) -> Self:
        with suppress(OSError):
            if not self.file.parent.is_dir():
                self.file.parent.unlink(missing_ok=True)
                self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.is_symlink() or not self.file.is_file():
                remove(self.file)
            if self._beat.rank == 0:
                forget(self.file.parent, self._beat.ranks)
        self._write("", "")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._changed.set()
        self._thread.join(self.interval_s)  # not for ever: the disk may hang
        frame = None
        while trace is not None:
            frame, trace = trace.tb_frame, trace.tb_next
        end = "done" if error is None else f"{type(error).__name__}: {error}"
        self._write("Ctrl-C" if isinstance(error, KeyboardInterrupt) else end, location(frame))

    def _run(self) -> None:
        while not self._over.is_set():
            self._changed.wait(self.interval_s)
            self._changed.clear()
            if not self._over.is_set():
                self._write("", location(sys._current_frames().get(self._main)))
                self._over.wait(min(SHORTEST_S, self.interval_s))

    def _write(self, end: str, at: str) -> None:
        with self._lock:
            since = time.monotonic() - self._entered
            beat = replace(self._beat, phase_s=since, time=time.time(), at=at, end=end[:300])
        with suppress(OSError):
            file = no_link(str(self.file), os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(file, encoded(beat), 0)
                self.written += 1
            finally:
                os.close(file)


def node() -> str:
    """This machine's name, slurm's where it gives one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def encoded(beat: Heartbeat) -> bytes:
    """One line of JSON, filled up with spaces to SIZE bytes."""
    text = json.dumps(asdict(beat))
    while len(text) >= SIZE:  # a long path or message; all the rest is short
        beat = replace(beat, at=beat.at[: len(beat.at) // 2], end=beat.end[: len(beat.end) // 2])
        text = json.dumps(asdict(beat))
    return text.ljust(SIZE - 1).encode("ascii") + b"\n"


def location(frame: FrameType | None) -> str:
    """Position of a thread: `module:line function < ...`, innermost first.

    The innermost function of all, and up to three of this package.
    """
    functions: list[str] = []
    while frame is not None and len(functions) < 4:
        module = str(frame.f_globals.get("__name__", "?"))
        if not functions or module.startswith("fastgrpo."):
            functions.append(f"{module}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(functions)


def forget(folder: Path, ranks: int) -> None:
    """Remove the files of ranks that this attempt does not have; the others are overwritten."""
    for file in folder.glob("rank-*"):
        number = file.name.removeprefix("rank-")
        if number.isdecimal() and int(number) >= ranks:
            file.unlink(missing_ok=True)


def read(run_dir: Path) -> list[Heartbeat]:
    """Every rank's last heartbeat, by rank.

    A file that is just being written for the first time, or damaged, is left out.
    """
    beats = []
    for file in (run_dir / FOLDER).glob("rank-*"):
        with suppress(OSError, ValueError, TypeError):
            beat = Heartbeat(**load_json(file))
            if all(_is_of_type(getattr(beat, field.name), field.type) for field in fields(beat)):
                beats.append(beat)
    return sorted(beats, key=lambda beat: beat.rank)


def first_failure(run_dir: Path) -> Heartbeat | None:
    """The last heartbeat of the rank that failed first; None where none did.

    Other ranks fail after it, as their collectives with it do.
    """
    failed = [beat for beat in read(run_dir) if beat.end not in ("", "done")]
    return min(failed, key=lambda beat: beat.time, default=None)


def _is_of_type(value: object, kind: object) -> bool:
    """Whether a value read from a file is one of a heartbeat's field."""
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, str) if kind is str else isinstance(value, int)
