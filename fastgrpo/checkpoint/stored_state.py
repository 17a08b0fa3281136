"""PyTorch's stored state, read without running code that a file brings along.

A distributed checkpoint's `.metadata` is a pickle, as is every value of it that is no tensor, and
PyTorch unpickles both unrestricted. Here the metadata may name the classes that PyTorch's writer
names and no others, and values are read weights-only.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

CHECKPOINT = "torch.distributed.checkpoint"
KNOWN = {
    f"{CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{CHECKPOINT}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # a layout by its name
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # from Python 3.13 on
}
"""What PyTorch's writer puts into `.metadata`, by module; dtypes beside it."""


class _Unpickler(pickle.Unpickler):
    """Refuses every class and function that PyTorch's writer does not name."""

    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class StoredState(FileSystemReader):
    """Reads a checkpoint's folder. Metadata that cannot be read raises ValueError."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata` by the restricted unpickler.  The arguments are PyTorch's."""
        file = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
            places = [str(info.relative_path) for info in metadata.storage_data.values()]
            keys = list(metadata.state_dict_metadata)
        except Exception as error:  # unpickling what is no metadata can raise anything
            raise ValueError(f".metadata cannot be read ({error})") from None
        if not isinstance(metadata, Metadata) or not all(isinstance(key, str) for key in keys):
            raise ValueError(".metadata is no checkpoint's")
        if outside := next((place for place in places if place != Path(place).name), None):
            raise ValueError(f".metadata names the file {outside!r}, which is not in its folder")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class ValuesWithoutCode(DefaultLoadPlanner):
    """PyTorch's planner of loading, whose values beside tensors hold no code either."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value, such as a learning rate, into the state that is loaded."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # PyTorch reads it unrestricted
        plain.seek(0)
        super().load_bytes(read_item, plain)
