"""Networks whose weights come last: built without memory, sharded, then read from their files, each
rank its own rows.

`outline` gives a network of a diffusers class with parameters on the meta device, which have a
shape and no memory. Adapters, hooks and FSDP2 are put on that. `fill` then gives each parameter
memory, of this rank's shard alone, and reads into it the rows of the files that belong there. So no
rank ever holds the whole network: at its peak a rank has its shard, and of the one file that it
reads the mapped pages, which the system takes back where memory is short.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import networks_of
from fastgrpo.models.loading import lora, weight_files
from fastgrpo.models.loading.weight_files import Place


@dataclass(frozen=True)
class Bytes:
    """How much of a network's files a rank has read, and how much it reads in all."""

    done: int
    own: int
    network: int  # of all ranks together, each counted once


Show = Callable[[Bytes], None]


def outline(kind: Any, folder: Path, device: torch.device) -> Any:
    """A network of the diffusers class `kind` as its folder has it, without weights: its parameters
    are on "meta".

    Its buffers, such as rotary tables, are real, on `device`. What lies in the files is compared
    with it.
    Raises UserError for another class's folder, a damaged config or file, a missing part, and a
    tensor that is missing, unknown, of another shape or quantised.
    """
    weight_files.check_class(kind, folder)
    config = weight_files.read_json(folder / "config.json")
    try:
        with _parameters_without_memory():
            network = kind.from_config(config)
    except (
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ZeroDivisionError,
        AttributeError,
    ) as error:
        problem = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"model.path: {folder}/config.json makes no {kind.__name__} ({problem}); download that "
            "folder again."
        ) from None
    network.register_to_config(_name_or_path=str(folder))  # as diffusers does
    network.weights_folder = folder  # which `fill` reads, by the folder's variant
    network._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    _places(network)
    return network


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Every parameter that a module gets inside is put on the meta device; buffers are not."""

    def on_meta(
        module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> nn.Parameter | None:
        return (
            None
            if parameter is None
            else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        )

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # may return one, see its docs
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def fill(
    network: Any,
    device: torch.device,
    show: Show = lambda _: None,
    memory: Callable[[Tensor], Tensor] | None = None,
) -> Bytes:
    """Give an outlined network's parameters memory on `device`, and their values; sharded or not,
    adapters too.

    show: is told after each tensor how far it is;  returns what was read. Talks to no other rank.
    memory: gives a parameter [...] without memory its like with some; None: on `device`
    Raises UserError for what `outline` does: the files may have changed since.
    """
    places = _places(network)
    memory = memory or partial(torch.empty_like, device=device)
    network._apply(lambda tensor: memory(tensor) if tensor.is_meta else tensor)
    parts: dict[Path, list[tuple[Place, Tensor, slice | EllipsisType]]] = {}
    for name, tensor in network.state_dict().items():
        local, rows = own_rows(tensor)
        if lora.is_adapter(name):
            local.copy_(lora.initial(name, tensor.shape)[rows])
        else:
            place = places[lora.unadapted(name)]
            parts.setdefault(place.file, []).append((place, local, rows))
    own = sum(
        local.numel() * place.dtype.itemsize for part in parts.values() for place, local, _ in part
    )
    whole = sum(
        place.shape.numel() * place.dtype.itemsize
        for part in parts.values()
        for place, _, _ in part
    )
    done = 0
    # mapped one after the other: what was read of one leaves the memory with it
    for file in sorted(parts):
        values = weight_files.mapped(file)
        for place, local, rows in parts[file]:
            value = values[place.key][rows]
            assert value.shape == local.shape, place
            local.copy_(value)
            done += local.numel() * place.dtype.itemsize
            show(Bytes(done, own, whole))
    return Bytes(done, own, whole)


def own_rows(tensor: Tensor) -> tuple[Tensor, slice | EllipsisType]:
    """This rank's part [n, ...] of a tensor [N, ...], and which rows of the whole it has.

    FSDP2 deals rows out as torch.chunk does.
    """
    if not isinstance(tensor, DTensor):
        return tensor, ...
    local, first, mesh = tensor.to_local(), 0, tensor.device_mesh
    places = mesh.get_coordinate()
    assert places is not None
    for dim, placement in enumerate(tensor.placements):  # HSDP: replicated, then sharded
        if isinstance(placement, Shard):
            assert placement.dim == 0
            first = places[dim] * -(-len(tensor) // mesh.size(dim))
    return local, slice(first, first + len(local))


def _places(network: Any) -> dict[str, Place]:
    """Where each tensor of the network without adapters lies, of experts in folders of their own.

    Raises UserError where the files do not fit it.
    """
    return {
        f"{prefix}{name}": place
        for prefix, one in networks_of(network).items()
        for name, place in _places_of_one(one).items()
    }


def _places_of_one(network: Any) -> dict[str, Place]:
    """`_places` of one diffusers network."""
    folder: Path = network.weights_folder
    found = weight_files.tensors(folder)
    # diffusers' own renaming of what its older versions wrote
    network._fix_state_dict_keys_on_load(found)
    wanted = {
        lora.unadapted(name): t
        for name, t in network.state_dict().items()
        if not lora.is_adapter(name)
    }
    kind = type(network).__name__.removeprefix("FSDP")
    where, remedy = (
        f"model.path: {folder}",
        "correct model_index.json or download that folder again",
    )
    ignored = network._keys_to_ignore_on_load_unexpected or ()
    if missing := sorted(set(wanted) - set(found)):
        raise UserError(
            f"{where} lacks {missing[0]} (and {len(missing) - 1} more) of a {kind}; {remedy}."
        )
    unknown = (
        name
        for name in set(found) - set(wanted)
        if not any(re.search(pattern, name) for pattern in ignored)
    )
    if more := sorted(unknown):
        raise UserError(
            f"{where} has {more[0]} (and {len(more) - 1} more), in {found[more[0]].file.name}, "
            f"which a {kind} of its "
            f"config.json has not; {remedy}."
        )
    if others := sorted(
        name for name, tensor in wanted.items() if found[name].shape != tensor.shape
    ):
        place, shape = found[others[0]], list(wanted[others[0]].shape)
        raise UserError(
            f"{where} has another shape of {others[0]} (and {len(others) - 1} more) of a {kind}, "
            f"{list(place.shape)} "
            f"in {place.file.name} instead of {shape}; {remedy}."
        )
    if coarse := sorted(
        name for name, tensor in wanted.items() if not _readable(found[name].dtype, tensor.dtype)
    ):
        place = found[coarse[0]]
        raise UserError(
            f"{where} has {coarse[0]} (and {len(coarse) - 1} more) in "
            f"{str(place.dtype).removeprefix('torch.')}, in "
            f"{place.file.name}; quantised weights are not trained: use the model's float32, "
            "bfloat16 or float16 ones."
        )
    return found


def _readable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a stored tensor's numbers are those of the model: not quantised ones, which want
    scales.
    """
    return (
        (stored.is_floating_point and stored.itemsize > 1)
        if wanted.is_floating_point
        else stored == wanted
    )
