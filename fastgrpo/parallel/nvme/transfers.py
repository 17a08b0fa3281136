"""How a record's moments come from the file and go back: read ahead, and written behind.

DeepSpeed's asynchronous I/O reads and writes past the kernel's cache, into three buffers: one is
read into, one is stepped, one is written. Where it cannot be had, the kernel moves the pages of the
mapped file. Both end with the same bits.

DeepSpeed 0.19 does not look at the results of its reads and writes. So a record ends with a stamp,
(its number + 1, times written), which a failed one leaves as it was. A full disk cannot be among
them: the file has its space from the beginning.
"""

import ctypes
import importlib.util
import mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgrpo.core.errors import described
from fastgrpo.core.processes import fail_alone
from fastgrpo.parallel.nvme.folder import BUFFERS
from fastgrpo.parallel.nvme.state_file import PAGE, Record, StateFile

BLOCK, DEPTH = 2**20, 32  # bytes of a request, and requests under way
EXTRA = 'pip install "fastgrpo[deepspeed]"'


class Transfers(Protocol):
    """The way between file and memory, for one step at a time, in the order of the records."""

    def ahead(self, record: Record) -> None:
        """Begin to read a record's moments."""

    def moments(self, record: Record) -> Tensor:
        """What `ahead` began to read, to be changed in place.  returns float32 [bytes / 4]"""

    def behind(self, record: Record) -> None:
        """Begin to write a record's moments."""

    def settle(self) -> None:
        """Wait for what was begun, where memory is used again."""


class Mapped:
    """By the kernel: the moments are the mapped file's."""

    def __init__(self, file: StateFile) -> None:
        self._file = file

    def ahead(self, record: Record) -> None:
        self._file.ahead(record.moments)

    def moments(self, record: Record) -> Tensor:
        """The file's own.  returns float32 [bytes / 4]"""
        return self._file.view(record.moments.start, torch.Size([len(record.moments) // 4]))

    def behind(self, record: Record) -> None:
        self._file.behind(record.moments)

    def settle(self) -> None:
        pass


class Unusable(Exception):
    """Why DeepSpeed's I/O cannot be had here."""


class DeepSpeedAio:
    """By DeepSpeed's asynchronous I/O."""

    def __init__(self, file: StateFile, pinned: bool) -> None:
        """Load DeepSpeed's I/O, whose first use compiles it for minutes; and take the buffers.

        pinned: CUDA pins the buffers
        Raises Unusable.
        """
        self._file = file
        largest = max(len(record.moments) for record in file.records)
        library = _library()
        # apart, since a handle waits for all that it was given
        self._reader, self._writer = (
            library.aio_handle(BLOCK, DEPTH, False, True, 1) for _ in range(2)
        )
        if pinned:
            self._buffers = [torch.empty(largest // 4, pin_memory=True) for _ in range(BUFFERS)]
        else:
            _check_locking(BUFFERS * largest)
            self._buffers = [
                self._reader.new_cpu_locked_tensor(largest // 4, torch.empty(0))
                for _ in range(BUFFERS)
            ]
        self._written = [0] * len(file.records)
        self._reading = self._writing = False
        if self._reader.async_pread(self._buffers[0][: PAGE // 4], file.path, 0):
            raise Unusable("its file system does not read past the cache, O_DIRECT")
        self._reader.wait()

    def ahead(self, record: Record) -> None:
        # what was written from this buffer two records ago has been waited for in `behind`
        begun = self._reader.async_pread(
            self._buffer(record), self._file.path, record.moments.start
        )
        self._reading = begun == 0
        if not self._reading:
            self._fail("a read was refused")

    def moments(self, record: Record) -> Tensor:
        """A buffer, whose stamp must be that of the last write.  returns float32 [bytes / 4]"""
        self._reader.wait()
        self._reading = False
        buffer = self._buffer(record)
        found, wanted = buffer.view(torch.int64)[-2:].tolist(), self._stamp(record)
        if found != wanted:
            self._fail(f"record {record.number} is not what was written, {found} for {wanted}")
        return buffer

    def behind(self, record: Record) -> None:
        self._end_writing()
        self._written[record.number] += 1
        buffer = self._buffer(record)
        buffer.view(torch.int64)[-2:] = torch.tensor(self._stamp(record))
        begun = self._writer.async_pwrite(buffer, self._file.path, record.moments.start)
        self._writing = begun == 0
        if not self._writing:
            self._fail("a write was refused")

    def settle(self) -> None:
        if self._reading:
            self._reader.wait()
            self._reading = False
        self._end_writing()

    def _end_writing(self) -> None:
        if self._writing:
            self._writer.wait()
            self._writing = False

    def _buffer(self, record: Record) -> Tensor:
        """The record's part of its buffer, float32 [bytes / 4]."""
        return self._buffers[record.number % BUFFERS][: len(record.moments) // 4]

    def _stamp(self, record: Record) -> list[int]:
        times = self._written[record.number]
        return [record.number + 1, times] if times else [0, 0]

    def _fail(self, problem: str) -> None:
        fail_alone(
            f"distributed.offload_path={self._file.folder}: {problem}; name another disk and start "
            "again: the run resumes from its newest checkpoint."
        )


def open_transfers(file: StateFile, pinned: bool) -> tuple[Transfers, str]:
    """DeepSpeed's where it can be had, else the kernel's; and which, in words.

    pinned: CUDA pins the buffers
    """
    try:
        return DeepSpeedAio(file, pinned), "DeepSpeed's asynchronous I/O"
    except Unusable as why:
        return Mapped(file), f"memory-mapped files ({why})"


def _library() -> Any:
    """DeepSpeed's compiled I/O. Raises Unusable."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Unusable(f"DeepSpeed is not installed: {EXTRA}")
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise Unusable("DeepSpeed finds no libaio: install libaio-dev")
        return builder.load(verbose=False)
    except Unusable:
        raise
    except Exception as error:  # of a compiler's run anything
        raise Unusable(f"DeepSpeed's I/O cannot be built, {described(error)}") from None


def _check_locking(size: int) -> None:
    """Raise Unusable where this process may not lock so many bytes: DeepSpeed would end it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with mmap.mmap(-1, size) as room:
        first = (ctypes.c_char * size).from_buffer(room)
        refused = libc.mlock(ctypes.addressof(first), size)
        if not refused:
            libc.munlock(ctypes.addressof(first), size)
        del first
    if refused:
        raise Unusable(f"{size / 1e6:,.0f} MB of memory cannot be locked: raise ulimit -l")
