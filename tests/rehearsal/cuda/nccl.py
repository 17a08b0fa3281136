"""torch.distributed with NCCL's rules on the library's device, and gloo underneath.

Of each collective the device, the contiguity and the type of its tensors are checked as NCCL does,
it is counted with its backend, and gloo carries the bytes. Communicators are destroyed by all ranks
together: one that comes alone would wait for ever, which is told.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from tests.rehearsal.cuda import core, waits

Call = Callable[..., Any]
NCCL_TYPES = frozenset(
    {
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    }
)
TENSORS = {
    "all_reduce": ("tensor",),
    "broadcast": ("tensor",),
    "reduce": ("tensor",),
    "send": ("tensor",),
    "recv": ("tensor",),
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_single": ("output", "input", "output_tensor", "input_tensor"),
    "reduce_scatter_tensor": ("output", "input"),
    "reduce_scatter_single": ("output", "input"),
    "all_to_all_single": ("output", "input"),
    "gather": ("tensor", "gather_list"),
    "scatter": ("tensor", "scatter_list"),
}
"""Where a collective has its tensors, the written ones first."""

backends: dict[str, dict[str, str]] = {}
"""By a group's name, for each type of device, what would carry its tensors."""

_host: Call = torch.ops.rehearsal.host
_plain: dict[str, Call] = {
    name: getattr(c10d, name)
    for name in (
        *TENSORS,
        "init_process_group",
        "new_group",
        "get_backend",
        "destroy_process_group",
    )
    if hasattr(c10d, name)
}


class Done:
    """The handle of a collective that is over."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _parsed(backend: Any) -> dict[str, str]:
    """A backend's name as {type of device: name}."""
    text = str(backend or "cpu:gloo,cuda:nccl").lower()
    if ":" in text:
        return dict(part.split(":", 1) for part in text.split(","))
    return {"cuda": "nccl"} if text == "nccl" else {"cpu": text, "cuda": text}


def _default_group() -> dist.ProcessGroup:
    return c10d._get_default_group()


def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
    """torch.distributed.init_process_group, by gloo whatever was asked for, but for "fake"."""
    _plain["init_process_group"]("fake" if backend == "fake" else "gloo", *args, **kwargs)
    backends[_default_group().group_name] = _parsed(backend)


def new_group(
    ranks: Any = None, timeout: Any = None, backend: Any = None, options: Any = None, **kwargs: Any
) -> Any:
    """torch.distributed.new_group, by gloo whatever was asked for, but for "fake"."""
    kwargs.pop("device_id", None)
    kwargs.pop("pg_options", None)
    parent = backends[_default_group().group_name]
    carrier = "fake" if "fake" in parent.values() else "gloo"
    group = _plain["new_group"](ranks, timeout, carrier, None, **kwargs)
    if isinstance(group, dist.ProcessGroup):
        backends[group.group_name] = parent if backend is None else _parsed(backend)
    return group


def get_backend(group: Any = None) -> str:
    """torch.distributed.get_backend: what was asked for."""
    found = backends[(group or _default_group()).group_name]
    return ",".join(f"{device}:{name}" for device, name in found.items())


def destroy_process_group(group: Any = None) -> None:
    """torch.distributed.destroy_process_group, with a look at who comes to it."""
    if group is None and dist.is_initialized() and "cuda:nccl" in get_backend():
        _await_all()
    _plain["destroy_process_group"](group)


def _await_all() -> None:
    """Wait for all ranks to destroy their communicators; tell where one would wait for ever."""
    size, store = dist.get_world_size(), c10d._get_default_store()
    deadline = time.monotonic() + float(os.environ.get("REHEARSAL_HANG_S", "30"))
    came = store.add("rehearsal/destroy", 1)
    while came < size and time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            came = store.add("rehearsal/destroy", 0)
        except RuntimeError:  # the rank that holds the store has left, so that all have come
            came = size
    if came < size:
        error = f"{sys.exc_info()[1]!r:.200}"
        waits.count("hang", f"destroy_process_group by {came} of {size} ranks, under way: {error}")
        print(
            f"rehearsal: rank {dist.get_rank()} would hang in destroy_process_group: {error}",
            file=sys.stderr,
            flush=True,
        )


def _check(name: str, group: Any, tensors: list[Tensor]) -> None:
    """Raise what NCCL would, and count the collective."""
    group = group or _default_group()
    if not isinstance(group, dist.ProcessGroup) or not tensors:
        return
    of = backends[group.group_name]
    for tensor in tensors:
        carrier = of.get(tensor.device.type)
        if carrier is None:
            waits.count("refused", f"{name} of a {tensor.device.type} tensor in a group of {of}")
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        if carrier == "nccl":
            _check_nccl(name, tensor)
        elif tensor.is_cuda:
            waits.count("gloo on the GPU", name)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        waits.count("mixed", f"{name} of {', '.join(sorted({t.device.type for t in tensors}))}")
        raise RuntimeError(f"{name}: tensors on {sorted(devices)}")
    waits.count("collective", f"{name} {of[tensors[0].device.type]}")


def _check_nccl(name: str, tensor: Tensor) -> None:
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
        waits.count("refused", f"{name} of a tensor that is not contiguous")
        raise ValueError("Tensors must be contiguous")
    if tensor.dtype not in NCCL_TYPES:
        waits.count("refused", f"{name} of {tensor.dtype}")
        raise TypeError(
            f"Input tensor data type is not supported for NCCL process group: {tensor.dtype}"
        )
    waits.touch("collective")
    if tensor.device.index != core.home():
        waits.count("refused", f"{name} of a tensor of another rank's GPU")
        raise RuntimeError(f"{name}: a tensor on {tensor.device}, local rank {core.home()}")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value or [] if isinstance(one, Tensor)]


def _checked(name: str) -> Call:
    """A collective with NCCL's rules before it and the host's memory under it."""
    plain, signature = _plain[name], inspect.signature(_plain[name])
    places = [place for place in TENSORS[name] if place in signature.parameters]

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        found = [tensor for place in places for tensor in _tensors(given.get(place))]
        _check(name, given.get("group"), found)
        if not any(tensor.is_cuda for tensor in found):
            return plain(*args, **kwargs)
        mean = given.get("op") == dist.ReduceOp.AVG  # which gloo has not
        if mean:
            given["op"] = dist.ReduceOp.SUM
        for place in places:
            value = given.get(place)
            if isinstance(value, Tensor):
                given[place] = _host(value)
            elif value is not None:
                given[place] = [_host(one) for one in value]
        asked, given["async_op"] = given.get("async_op", False), False
        if "async_op" not in signature.parameters:
            del given["async_op"]
        plain(*bound.args, **bound.kwargs)
        if mean:
            found[0].div_(dist.get_world_size(given.get("group")))
        return Done() if asked else None

    return call


REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


def _group(name: str) -> dist.ProcessGroup:
    return c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    """x: [...];  returns [...]"""
    return _all_reduce_(x.clone(memory_format=torch.contiguous_format), op, group)


def _all_reduce_(x: Tensor, op: str, group: str) -> Tensor:
    """x: [...];  returns x"""
    dist.all_reduce(x, REDUCE[op.lower()], group=_group(group))
    return x


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """x: [n, ...];  returns [size * n, ...]"""
    out = x.new_empty(x.shape[0] * size, *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=_group(group))
    return out


def _reduce_scatter(x: Tensor, op: str, size: int, group: str) -> Tensor:
    """x: [size * n, ...];  returns [n, ...]"""
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), REDUCE[op.lower()], group=_group(group))
    return out


def _all_to_all(x: Tensor, out_sizes: list[int], in_sizes: list[int], group: str) -> Tensor:
    """x: [sum(in_sizes), ...];  returns [sum(out_sizes), ...]"""
    out = x.new_empty(sum(out_sizes), *x.shape[1:])
    dist.all_to_all_single(
        out, x.contiguous(), list(out_sizes), list(in_sizes), group=_group(group)
    )
    return out


def _broadcast(x: Tensor, src: int, group: str) -> Tensor:
    """x: [...];  returns [...]"""
    out = x.clone()
    dist.broadcast(out, src, group=_group(group))
    return out


FUNCTIONAL: dict[str, Call] = {
    "all_reduce": _all_reduce,
    "all_reduce_": _all_reduce_,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
    "broadcast": _broadcast,
    "wait_tensor": lambda x: x,
}
"""The operators of torch.distributed._functional_collectives, which DTensor calls."""

_functional = torch.library.Library("_c10d_functional", "IMPL")


def _put(modules: Iterable[Any], values: dict[str, Call]) -> None:
    for module in modules:
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)


def install() -> None:
    """Put the collectives and the groups into torch.distributed."""
    groups: dict[str, Call] = {
        "init_process_group": init_process_group,
        "new_group": new_group,
        "get_backend": get_backend,
        "destroy_process_group": destroy_process_group,
    }
    _put((c10d, dist), {name: _checked(name) for name in TENSORS if name in _plain})
    _put((c10d, dist, device_mesh), groups)
    for name, function in FUNCTIONAL.items():
        _functional.impl(name, function, "CUDA")
