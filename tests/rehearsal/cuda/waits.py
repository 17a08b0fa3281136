"""Counts of host waits, collectives and mistakes, by the line of the program that caused them."""

import atexit
import ctypes
import json
import os
import sys
import threading
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import FrameType

from tests import ROOT
from tests.rehearsal.cuda import core
from tests.rehearsal.cuda.causes import Cause

OWN = str(Path(__file__).parent.parent)

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
    highest = max(core.highest(index) for index in range(core.GPUS)) / core.GIB
    file.write_text(json.dumps({"counts": rows, "peak_gib": highest}, indent=1))
