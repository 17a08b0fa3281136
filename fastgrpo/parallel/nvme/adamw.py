"""AdamW over moments that lie in a file: stepped record by record, on local tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from fastgrpo.core.config import Optimizer
from fastgrpo.parallel.nvme.state_file import Record, Slot, StateFile, over
from fastgrpo.parallel.nvme.transfers import Transfers, open_transfers


@dataclass(frozen=True)
class States:
    """A rank's file, and the way to its moments."""

    file: StateFile
    transfers: Transfers
    way: str  # in words

    @classmethod
    def of_network(cls, network: nn.Module, folder: Path, pinned: bool) -> "States":
        """The states of a sharded network's trained parameters, whose weights need not be there.

        pinned: CUDA pins buffers
        Raises UserError where the folder or its disk refuses.
        """
        file = StateFile.of_network(network, folder)
        return cls(file, *open_transfers(file, pinned))

    def __str__(self) -> str:
        size = self.file.size / 1e6
        return f"{size:,.1f} MB of masters and moments per rank in {self.file.folder} by {self.way}"


class OffloadedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, bit for bit, with the moments of `States`.

    Its `state` holds the moments as tensors over the mapped file, so that checkpoints are those of
    any other AdamW. While a record is stepped, the next is read and the last is written.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], states: States, settings: Optimizer
    ) -> None:
        """trained: this rank's shards by name, in the file's order"""
        super().__init__(
            trained.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._trained, self._states, self._settings = trained, states, settings
        self._changed = True  # mapped moments may have been written since the last step
        for name, parameter in trained.items():
            self.state[parameter] = {"step": torch.zeros(()), **self._mapped(name)}
        self.register_load_state_dict_post_hook(OffloadedAdamW._put_back)  # type: ignore[arg-type]

    def twin(self) -> "OffloadedAdamW":
        """An optimizer of the same parameters that shares the moments, for a trial before training.

        Whoever tries it leaves the moments zero.
        """
        self._changed = True
        return OffloadedAdamW(self._trained, self._states, self._settings)

    def _mapped(self, name: str) -> dict[str, Tensor]:
        """A parameter's moments as tensors over the file, each [...] like the parameter."""
        pair = self._states.file.moments(name)
        keys, parameter = ("exp_avg", "exp_avg_sq"), self._trained[name]
        return {key: over(parameter, one) for key, one in zip(keys, pair, strict=True)}

    @torch.no_grad()
    def _put_back(self) -> None:
        """Copy what a checkpoint brought into the file, where it is not there already.

        An AdamW in memory has no state of a parameter that never had a gradient.
        """
        self._changed = True
        for name, parameter in self._trained.items():
            loaded, mapped = self.state[parameter], self._mapped(name)
            for key, moment in mapped.items():
                place = _local(moment)
                if key not in loaded:
                    place.zero_()
                elif (value := _local(loaded[key])).data_ptr() != place.data_ptr():
                    place.copy_(value)
            self.state[parameter] = {"step": loaded.get("step", torch.zeros(())), **mapped}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient.  closure: not taken"""
        assert closure is None
        file, transfers = self._states.file, self._states.transfers
        if self._changed:  # direct reads must find it on the disk
            file.flush()
            self._changed = False
        try:
            transfers.ahead(file.records[0])
            for record, following in zip_longest(file.records, file.records[1:]):
                moments = transfers.moments(record)
                if following is not None:
                    file.ahead(following.masters)
                    transfers.ahead(following)
                self._step_record(record, moments)
                transfers.behind(record)
                file.behind(record.masters)
        finally:
            transfers.settle()

    def _step_record(self, record: Record, moments: Tensor) -> None:
        """Step a record's shards.  moments: float32 [bytes / 4], changed in place"""
        group = self.param_groups[0]
        slots = [slot for slot in record.slots if self._trained[slot.name].grad is not None]
        parameters = [self._trained[slot.name] for slot in slots]
        first, second = zip(*_moments(slots, record, moments), strict=True) if slots else ((), ())
        adamw(
            [_local(parameter) for parameter in parameters],
            [_local(parameter.grad) for parameter in parameters],
            list(first),
            list(second),
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _moments(
    slots: Sequence[Slot], record: Record, moments: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both moments of each slot, [...] like its shard, in a record's moments [bytes / 4]."""
    for slot in slots:
        places = ((start - record.moments.start) // 4 for start in (slot.exp_avg, slot.exp_avg_sq))
        size = slot.shape.numel()
        first, second = (moments[place : place + size].view(slot.shape) for place in places)
        yield first, second


def _local(tensor: Any) -> Tensor:
    """This rank's shard [...] of a tensor."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    assert isinstance(local, Tensor)
    return local
