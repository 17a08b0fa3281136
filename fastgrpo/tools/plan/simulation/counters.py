"""Counting what a rank sends and computes while it runs, with or without contents in its
tensors.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}
SMALL = 64  # elements: the gradient's norm and other scalars are not counted


class Sent(TorchDispatchMode):
    """Counts what one rank sends: (n - 1) / n of a gathered or scattered tensor, twice that of a
    reduced one.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name in KINDS:
            self._note(KINDS[name], args)
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, args: Any) -> None:
        tensors = list(_tensors(args))
        if kind == "all-to-all" and not (
            tensors[0].ndim == 4 and tensors[0].shape[1] == self.batch
        ):
            # of the replicated text's heads, and of the output: see sequence_parallel.gather
            kind = "gather of tokens"
        whole, group = max(tensors, key=lambda tensor: tensor.numel()), _group(args)
        if whole.numel() <= SMALL:
            return
        ranks = dist.get_world_size(group)
        once = whole.numel() * whole.itemsize * (ranks - 1) // ranks
        self.sent[kind] += 2 * once if kind == "all-reduce" else once
        self.calls[kind] += 1


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """The tensors, of any shape [...], in an operator's nested arguments."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from _tensors(argument)


def _group(arguments: Any) -> dist.ProcessGroup:
    """The process group among a collective's arguments, which the dispatcher has boxed."""
    boxed = next(
        a
        for a in arguments
        if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
    )
    return dist.ProcessGroup.unbox(boxed)


def _attention_flops(
    q: Any, k: Any, v: Any, *_: object, out_shape: object = None, **__: object
) -> int:
    """FLOPs of the CPU's flash attention, which FlopCounterMode leaves out.

    q: [B, H, S, D];  k: [B, H, L, D]
    """
    batch, heads, queries, dim = q
    return int(2 * batch * heads * queries * k[2] * (dim + v[3]))


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: object, **__: object) -> int:
    """Five products instead of two: the scores again, and the gradients of v, of the scores, of q
    and of k.
    """
    return math.ceil(2.5 * _attention_flops(q, k, v))


def counting_flops() -> FlopCounterMode:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {attention: _attention_flops, backward: _attention_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)
