"""What torch.cuda says of the device and its memory, and storages that are resized or loaded."""

from typing import Any

import torch

from tests.rehearsal.cuda import core, waits
from tests.rehearsal.cuda.device import DeviceLike, index_of


class Properties:
    """torch.cuda.get_device_properties: an H100 with the library's bytes."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor, multi_processor_count, warp_size = 9, 0, 132, 32
    L2_cache_size, shared_memory_per_block, regs_per_multiprocessor = 50 << 20, 49152, 65536
    max_threads_per_multi_processor = 2048
    gcnArchName = ""

    @property
    def total_memory(self) -> int:
        return core.limit()


def available() -> bool:
    """torch.cuda.is_available."""
    return not core.hidden()


def device_count() -> int:
    """torch.cuda.device_count."""
    return 0 if core.hidden() else core.GPUS


def allocated(device: DeviceLike = None) -> int:
    """Bytes that tensors take."""
    return core.allocated(index_of(device))


def peak(device: DeviceLike = None) -> int:
    """The most bytes that tensors took."""
    return core.peak(index_of(device))


def reset_peak(device: DeviceLike = None) -> None:
    """torch.cuda.reset_peak_memory_stats."""
    core.reset_peak(index_of(device))


def free_and_total(device: DeviceLike = None) -> tuple[int, int]:
    """torch.cuda.mem_get_info."""
    return core.limit() - core.allocated(index_of(device)), core.limit()


def statistics(device: DeviceLike = None) -> dict[str, int]:
    """torch.cuda.memory_stats: the library's allocator keeps no blocks of its own."""
    kinds = ("allocated_bytes", "reserved_bytes")
    return {f"{kind}.all.current": allocated(device) for kind in kinds} | {
        f"{kind}.all.peak": peak(device) for kind in kinds
    }


def empty_cache() -> None:
    """torch.cuda.empty_cache: it waits for the device."""
    waits.count("sync", "empty_cache")


def _resize(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """UntypedStorage.resize_: FSDP frees and takes gathered weights by it."""
    if self.device.type != "cuda":
        return _plain_resize(self, size)
    with torch.no_grad():
        holder = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self, 0, (0,), (1,))
        torch.ops.rehearsal.resize_storage(holder, size)
    return self


def _load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    """torch.load: a CPU build makes no CUDA storage from a file, so tensors come to the host."""
    return _plain_load(f, "cpu" if map_location is None else map_location, *args, **kwargs)


_plain_resize: Any = torch.UntypedStorage.resize_
_plain_load: Any = torch.load


def install() -> None:
    """Put the device's numbers into torch.cuda."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("_lazy_init", "init", "ipc_collect", "seed", "seed_all"), lambda: None
    )
    for name, value in (
        nothing
        | {
            "is_available": available,
            "is_initialized": available,
            "device_count": device_count,
            "is_bf16_supported": lambda *_, **__: True,
            "is_tf32_supported": lambda: True,
            "get_device_name": lambda device=None: Properties.name,
            "get_device_properties": lambda device=None: Properties(),
            "get_device_capability": lambda device=None: (Properties.major, Properties.minor),
            "get_arch_list": lambda: ["sm_90"],
            "memory_allocated": allocated,
            "memory_reserved": allocated,
            "max_memory_allocated": peak,
            "max_memory_reserved": peak,
            "reset_peak_memory_stats": reset_peak,
            "mem_get_info": free_and_total,
            "memory_stats": statistics,
            "empty_cache": empty_cache,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device="cuda": None,
            "_is_in_bad_fork": lambda: False,
        }
    ).items():
        setattr(torch.cuda, name, value)
    for name, value in {"empty_cache": empty_cache}.items():
        setattr(torch.cuda.memory, name, value)
    for name, value in {"resize_": _resize}.items():
        setattr(torch.UntypedStorage, name, value)
    for name, value in {"load": _load}.items():
        setattr(torch, name, value)
    torch.version.cuda = "13.0"
