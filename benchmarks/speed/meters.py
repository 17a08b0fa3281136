"""What an iteration communicates and evaluates, by phase: counted, not timed.

Counting slows an iteration down, so that benchmarks count in their warm-up.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.run.stopwatch import Stopwatch

KINDS = ("bytes", "forwards", "evaluations", "trained")
Counts = dict[str, Counter[str]]  # phase -> KINDS


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor of each collective: what a gather gives, what a scatter or a
    reduction takes.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            found = tensors((args, kwargs or {}))
            self.counts["bytes"] += max((t.numel() * t.itemsize for t in found), default=0)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(network: nn.Module, with_bytes: bool = True) -> Iterator[Counts]:
    """Counts of what runs inside, by the phase whose lap of a `Stopwatch` follows.

    bytes: communicated, 0 unless with_bytes, which makes every operation slower;  forwards: passes
    of the network;
    evaluations: samples in them;  trained: those with gradient
    """
    phases: Counts = {}
    now: Counter[str] = Counter()
    lap = Stopwatch.lap

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples = len(tensors((args, kwargs))[0])
        now.update(forwards=1, evaluations=samples, trained=samples * torch.is_grad_enabled())

    def counting_lap(self: Stopwatch, phase: str, *more: Any, **then: Any) -> None:
        lap(self, phase, *more, **then)
        phases.setdefault(phase, Counter()).update(now)
        now.clear()

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    with (
        Collectives(now) if with_bytes else nullcontext(),
        patch.object(Stopwatch, "lap", counting_lap),
    ):
        yield phases
    hook.remove()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def held_bytes(value: Any) -> int:
    """Bytes that the tensors in a value keep alive; storage that several share counts once."""
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)
        }.values()
    )
