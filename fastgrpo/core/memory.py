"""Memory: peaks of the GPU's allocator and of the process, and what is free."""

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.core.processes import local_world_size
from fastgrpo.core.units import GIB

KINDS = ("allocated", "reserved", "resident")
"""Kinds of memory, in GiB: of tensors on the GPU, held by PyTorch's allocator, of the process.

Resident is VmHWM of /proc/self/status, set back through /proc/self/clear_refs. Where the kernel
refuses that it is VmRSS at the reading, which misses what came and went in between. Without a GPU
the first two are 0.
"""


class Peaks:
    """Reads peaks and begins new ones: some 0.1 ms per reading, which no GPU is waited for."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.field = "VmHWM:" if self._restart() else "VmRSS:"

    def read(self) -> tuple[float, float, float]:
        """The KINDS of the time since the last reading, in GiB; of this process alone."""
        allocated, reserved = 0.0, 0.0
        if self.gpu:
            allocated = torch.cuda.max_memory_allocated() / GIB
            reserved = torch.cuda.max_memory_reserved() / GIB
        resident = self._resident()
        self._restart()
        return allocated, reserved, resident

    def _resident(self) -> float:
        with contextlib.suppress(OSError):  # not Linux
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            for line in status.splitlines():
                if line.startswith(self.field):
                    return int(line.split()[1]) * 1024 / GIB
        return 0.0

    def _restart(self) -> bool:
        """Begin new peaks.  returns whether the host's could be set back"""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            file = os.open("/proc/self/clear_refs", os.O_WRONLY)
        except OSError:
            return False
        try:
            return os.write(file, b"5") == 1  # 5: only the peak of the resident memory, see proc(5)
        except OSError:
            return False
        finally:
            os.close(file)


def free_memory(device: torch.device) -> float:
    """Bytes that this rank may still take: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        # the allocator's, free for this rank
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + held)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(
        int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
    )
    return available / local_world_size()


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU's tensor in pinned host memory; a tensor of the CPU is returned itself.

    The copy is under way when this returns. Work that is queued on the same stream sees all of it;
    the host itself must wait for the stream first.

    tensor: [...] of any dtype;  returns [...] of the same shape and dtype
    """
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
