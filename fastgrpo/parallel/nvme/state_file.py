"""One rank's masters and moments in a file that is mapped into memory.

FSDP2 gathers from the masters wherever they lie, so they are tensors over the mapped file: the
kernel keeps of them what there is room for. The moments are needed in the optimizer's step alone,
record by record; a checkpoint reads and writes them as mapped tensors, like any others.

                 float32, each shard on a boundary of 64 bytes, each part on one of a page
    record 0     masters of its shards | exp_avg, exp_avg_sq of each shard, stamp
    record 1     ...
"""

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fastgrpo.parallel.nvme.folder import RECORD_BYTES, open_file

PAGE, LINE = 4096, 64  # bytes: of direct I/O, of a processor's cache
STAMP = 16  # bytes, see transfers.py


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of a trained parameter."""

    shape: torch.Size
    mapped: bool
    """Whether the file can be FSDP2's own memory of it: not where FSDP2 pads the rows, since it
    moves those to memory of its own."""


@dataclass(frozen=True)
class Slot:
    """A shard's places in the file, in bytes from its beginning."""

    name: str
    shape: torch.Size
    master: int | None  # None: in host memory
    exp_avg: int
    exp_avg_sq: int


@dataclass(frozen=True)
class Record:
    """Shards that are stepped together; bytes from the file's beginning."""

    number: int
    slots: tuple[Slot, ...]
    masters: range
    moments: range  # of whole pages, the stamp at the end


def layout(shards: Mapping[str, LocalShard], largest: int) -> tuple[Record, ...]:
    """Records of the shards in their order.  largest: bytes of a record's moments"""
    records: list[Record] = []
    waiting: dict[str, LocalShard] = {}
    for name, shard in shards.items():
        if waiting and 2 * sum(map(_bytes, (*waiting.values(), shard))) > largest:
            records.append(_record(records, waiting))
            waiting = {}
        waiting[name] = shard
    records.append(_record(records, waiting))
    return tuple(records)


def _record(before: list[Record], shards: Mapping[str, LocalShard]) -> Record:
    start = place = before[-1].moments.stop if before else 0
    masters: dict[str, int] = {}
    for name, shard in shards.items():
        if shard.mapped:
            masters[name] = place
            place += _bytes(shard)
    middle = place = _up(place, PAGE)
    slots = []
    for name, shard in shards.items():
        first, second = place, place + _bytes(shard)
        place = second + _bytes(shard)
        slots.append(Slot(name, shard.shape, masters.get(name), first, second))
    stop = _up(place + STAMP, PAGE)
    return Record(len(before), tuple(slots), range(start, middle), range(middle, stop))


def _bytes(shard: LocalShard) -> int:
    return _up(4 * shard.shape.numel(), LINE)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


class StateFile:
    """The file, its records, and tensors over it."""

    def __init__(
        self, folder: Path, shards: Mapping[str, LocalShard], largest: int = RECORD_BYTES
    ) -> None:
        """Make the file.  largest: as of `layout`

        Raises UserError where the folder or the disk refuses.
        """
        self.folder = folder
        self.records = layout(shards, largest)
        self.size = self.records[-1].moments.stop
        self._file = open_file(folder, self.size)
        self._map = mmap.mmap(self._file.fileno(), self.size)
        self._slots = {slot.name: slot for record in self.records for slot in record.slots}

    @classmethod
    def of_network(
        cls, network: nn.Module, folder: Path, largest: int = RECORD_BYTES
    ) -> "StateFile":
        """A file for the trained shards of a sharded network, whose weights need not be there."""
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        return cls(folder, {name: _local_shard(p) for name, p in trained.items()}, largest)

    def memory_of(
        self, network: nn.Module, otherwise: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """What gives a tensor [...] of the network memory, by `nn.Module._apply`.

        otherwise: gives that of a tensor which is not in the file
        """
        names = {id(p): name for name, p in network.named_parameters() if name in self._slots}

        def memory(tensor: Tensor) -> Tensor:
            """The like of a tensor [...] with memory."""
            name = names.get(id(tensor))
            slot = None if name is None else self._slots[name]
            if slot is None or slot.master is None:
                return otherwise(tensor)
            return over(tensor, self.view(slot.master, slot.shape))

        return memory

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """AdamW's moments of a parameter's shard, both [...] float32 like the shard."""
        slot = self._slots[name]
        return self.view(slot.exp_avg, slot.shape), self.view(slot.exp_avg_sq, slot.shape)

    def view(self, start: int, shape: torch.Size) -> Tensor:
        """The file from a byte on, as float32 of a shape [...], with a storage of its own."""
        if not shape.numel():
            return torch.empty(shape)
        flat = torch.frombuffer(self._map, dtype=torch.float32, count=shape.numel(), offset=start)
        return flat.view(shape)

    @property
    def path(self) -> str:
        """A path that opens the file, in this process."""
        return f"/proc/self/fd/{self._file.fileno()}"

    def flush(self) -> None:
        """Wait until the disk has what was written through the mapped tensors."""
        self._map.flush()

    def ahead(self, part: range) -> None:
        """Have the kernel read a part, and return at once."""
        os.posix_fadvise(self._file.fileno(), part.start, len(part), os.POSIX_FADV_WILLNEED)

    def behind(self, part: range) -> None:
        """Have the kernel write what changed in a part, and return at once.

        "Not needed" is how Linux is told so; pages that are mapped stay until room is short.
        """
        os.posix_fadvise(self._file.fileno(), part.start, len(part), os.POSIX_FADV_DONTNEED)


def over(like: Tensor, local: Tensor) -> Tensor:
    """A tensor placed on the ranks as `like` [N, ...], whose shard is `local` [n, ...] itself.

    `DTensor.from_local` would move a shard in host memory to the mesh's GPU.
    """
    if not isinstance(like, DTensor):
        return local
    tensor = torch.empty_like(like, device=local.device)
    assert isinstance(tensor, DTensor) and tensor.to_local().shape == local.shape
    tensor._local_tensor = local
    return tensor


def _local_shard(parameter: Tensor) -> LocalShard:
    """This rank's part of a parameter [N, ...]."""
    if not isinstance(parameter, DTensor):
        return LocalShard(parameter.shape, mapped=True)
    ranks = [
        parameter.device_mesh.size(dim)
        for dim, placement in enumerate(parameter.placements)
        if isinstance(placement, Shard)
    ]
    even = all(len(parameter) % size == 0 for size in ranks)
    return LocalShard(parameter.to_local().shape, mapped=even)
