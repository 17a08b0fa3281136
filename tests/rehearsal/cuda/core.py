"""The compiled library, loaded before `import torch` has asked for CUDA's hooks."""

import ctypes
import os

from tests.rehearsal.cuda import build

GIB = 2**30
GPUS = int(os.environ.get("REHEARSAL_GPUS", "8"))
ANY, LAST = -1, -1
"""All streams, and the end of what is queued: arguments of `flush`."""


def _loaded() -> ctypes.CDLL:
    """The library with its signatures, its device in place of CUDA."""
    folder = build.torch_folder() / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build.build()), mode=ctypes.RTLD_GLOBAL)
    for name in ("allocated", "peak", "highest", "limit", "sequence", "pending"):
        getattr(library, f"rehearsal_{name}").restype = ctypes.c_int64
    library.rehearsal_start.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.rehearsal_set_stream.argtypes = [ctypes.c_int64]
    library.rehearsal_set_limit.argtypes = [ctypes.c_int64]
    library.rehearsal_flush.argtypes = [ctypes.c_int64, ctypes.c_int64]
    if library.rehearsal_start(GPUS, _bytes()) != 0:
        raise RuntimeError("this torch has a CUDA of its own, or its hooks were asked for before")
    return library


def _bytes() -> int:
    return int(float(os.environ.get("REHEARSAL_GB", "80")) * GIB)


library = _loaded()


def home() -> int:
    """The device that belongs to this process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every device, as it does with CUDA."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def limit_again() -> None:
    """Give each device the memory that REHEARSAL_GB says now: for a forked process."""
    library.rehearsal_set_limit(_bytes())


def device() -> int:
    """The calling thread's device."""
    return int(library.rehearsal_device())


def set_device(index: int) -> None:
    """Change the calling thread's device."""
    library.rehearsal_set_device(index)


def set_stream(number: int) -> None:
    """Change the calling thread's stream."""
    library.rehearsal_set_stream(number)


def sequence() -> int:
    """The number of the last copy that was put off."""
    return int(library.rehearsal_sequence())


def pending() -> int:
    """How many copies are put off."""
    return int(library.rehearsal_pending())


def flush(stream: int, until: int) -> None:
    """Carry out the copies of a stream up to a number: ANY and LAST are all."""
    library.rehearsal_flush(stream, until)


def allocated(index: int) -> int:
    """Bytes of a device that are taken."""
    return int(library.rehearsal_allocated(index))


def peak(index: int) -> int:
    """The most bytes of a device that were taken."""
    return int(library.rehearsal_peak(index))


def highest(index: int) -> int:
    """The most bytes of a device since the process began, whatever peaks were set back."""
    return int(library.rehearsal_highest(index))


def reset_peak(index: int) -> None:
    """Begin a new peak of a device."""
    library.rehearsal_reset_peak(index)


def limit() -> int:
    """Bytes of each device."""
    return int(library.rehearsal_limit())
