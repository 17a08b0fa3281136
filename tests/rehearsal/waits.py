"""Counts of host waits, collectives and mistakes, by the line of the program that caused them."""

import atexit
import ctypes
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import FrameType

from tests import ROOT
from tests.rehearsal import core

OWN = str(Path(__file__).parent)
BAD = ("mixed", "refused", "race", "hang", "gloo on the GPU", "foreign")
"""Kinds that no job may have: what a GPU would refuse, or would do wrongly and silently."""


@dataclass(frozen=True, order=True)
class Cause:
    """What was done, and the innermost line of the program that did it."""

    kind: str  # sync, collective, or one of BAD
    what: str
    file: str  # relative to the repository, or to site-packages where no line of ours is below
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.kind} {self.what}, {self.file}:{self.line} {self.function}"


@dataclass(frozen=True)
class Counted:
    """A cause and how often it was there."""

    cause: Cause
    count: int


counts: Counter[Cause] = Counter()
lock = threading.RLock()


def count(kind: str, what: str) -> None:
    """Note that the calling thread did this."""
    file, function, line = _place(sys._getframe(1))
    with lock:
        counts[Cause(kind, what, file, function, line)] += 1


def touch(what: str) -> None:
    """Note a use of the thread's device where it is not the process's: it would open a context."""
    if core.device() != core.home():
        count("foreign", f"{what} on cuda:{core.device()} by local rank {core.home()}")


def _place(frame: FrameType | None) -> tuple[str, str, int]:
    """The innermost line of the program, or of a library where no frame is ours."""
    outside = ("", "", 0)
    while frame is not None:
        code = frame.f_code
        file = _named(code.co_filename)
        if file and file[0] != "/":
            return file, code.co_qualname.replace(".<locals>", ""), frame.f_lineno
        if file and not outside[0]:
            outside = (file.rpartition("site-packages/")[2], code.co_qualname, frame.f_lineno)
        frame = frame.f_back
    return outside


@cache
def _named(file: str) -> str:
    """A path of ours relative to the root, another one as it is; "" for frames that never count."""
    path = os.path.realpath(file)
    if file.startswith("<") or path.startswith(OWN):
        return ""
    inside = path.startswith(f"{ROOT}{os.sep}") and "site-packages" not in path
    return os.path.relpath(path, ROOT) if inside else path


def _told(kind: bytes, what: bytes) -> None:
    """Called by the library, in the thread that waits."""
    count(kind.decode(), what.decode())
    if kind == b"sync":
        touch("wait")


_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(_told)


def install() -> None:
    """Have the library tell every wait, and write the report when the process ends."""
    core.library.rehearsal_callback(_callback)
    atexit.register(write)


def forget() -> None:
    """Begin anew: for a forked process."""
    with lock:
        counts.clear()


def write() -> None:
    """Write the counts into the file REHEARSAL_REPORT; {rank} and {pid} in its name are replaced."""
    name = os.environ.get("REHEARSAL_REPORT")
    if not name:
        return
    rank = os.environ.get("RANK", "0")
    file = Path(name.replace("{rank}", rank).replace("{pid}", str(os.getpid())))
    with lock:
        rows = [asdict(cause) | {"count": number} for cause, number in sorted(counts.items())]
    peaks = [core.peak(index) / core.GIB for index in range(core.GPUS)]
    file.write_text(json.dumps({"counts": rows, "peak_gib": max(peaks)}, indent=1))


def read(file: Path) -> Iterator[Counted]:
    """The counts of a report."""
    for row in json.loads(file.read_text())["counts"]:
        number = row.pop("count")
        yield Counted(Cause(**row), number)
