"""A network as sharded safetensors, written and read with one tensor in memory at a time.

The format is a length, a JSON header with every tensor's dtype, shape and offsets, and the tensors'
bytes; since shapes are known before values, the header can be written first and the values streamed
after it.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.models.loading import weight_files
from fastgrpo.models.loading.weight_files import cast

WEIGHTS = "diffusion_pytorch_model"
ADAPTERS = "pytorch_lora_weights.safetensors"
MORE_ADAPTERS = "pytorch_lora_weights_{}.safetensors"
"""The file of the adapters of a second network, which diffusers loads by a call of its own."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 64
"""Bytes. Loaded tensors lie in memory as in the file, and on CPUs the last bits of a matrix product
depend on that: so every tensor begins at such a multiple, as torch's own do, and an export computes
what the checkpoint computed."""

Layout = Mapping[str, tuple[torch.Size, torch.dtype]]


def write_network(
    folder: Path, layout: Layout, read: Callable[[str], Tensor], max_shard_bytes: int
) -> list[Path]:
    """Write every tensor of `layout` to `folder` as diffusers names such files.

    With an index where there are several files.

    layout: shape and dtype by name, in the order of writing
    read: name -> tensor [...], called once for each; cast to the layout's dtype
    returns the files of weights; a tensor larger than `max_shard_bytes` has a file of its own
    """
    shards = split(layout, max_shard_bytes)
    files = [folder / f"{WEIGHTS}.safetensors"]
    if len(shards) > 1:
        files = [
            folder / f"{WEIGHTS}-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        file_of = {
            name: file.name for file, names in zip(files, shards, strict=True) for name in names
        }
        total = sum(size_of(*layout[name]) for name in layout)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )
    for file, names in zip(files, shards, strict=True):
        write_file(file, {name: layout[name] for name in names}, read)
    return files


def split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    """Names by file: in order, a new file where the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in layout.items():
        size = size_of(shape, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_file(file: Path, layout: Layout, read: Callable[[str], Tensor]) -> None:
    """Write one safetensors file.  read: name -> tensor [...] of the layout's shape"""
    layout = dict(sorted(layout.items(), key=lambda item: _alignment(*item[1])))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + size_of(shape, dtype)
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (shape, dtype) in layout.items():
            tensor = read(name)
            assert tensor.shape == shape, name
            flat = cast(name, tensor, dtype).contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


def _alignment(shape: torch.Size, dtype: torch.dtype) -> tuple[bool, int]:
    """A key for sorting: tensors that keep the next one aligned come first, then large elements."""
    return size_of(shape, dtype) % ALIGNMENT != 0, -dtype.itemsize


def size_of(shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return shape.numel() * dtype.itemsize


def open_network(folder: Path) -> Callable[[str], Tensor]:
    """A reader, name -> tensor [...], of a folder of diffusers' weights.

    No file stays open between two reads. Raises UserError, at once or when reading, where a file or
    a tensor is missing or damaged.
    """
    places = weight_files.tensors(folder)

    def read(name: str) -> Tensor:
        """One tensor [...] as stored."""
        if name not in places:
            raise UserError(f"model.path: {folder} lacks {name}; download that folder again.")
        file = places[name].file
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model.path: {file} cannot be read ({error}); download that folder again."
            ) from None

    return read
