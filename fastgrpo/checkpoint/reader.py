"""The weights of a checkpoint, read one tensor at a time: for sampling and export.

No process group, no optimizer state, and the same on any number of ranks: a tensor is put together
from the shards that the training ranks wrote, when it is asked for.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastgrpo.checkpoint.stored_state import StoredState
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json_or_none, sha256
from fastgrpo.models.loading.streaming import own_rows

Step = int | Literal["best", "newest"]
ALWAYS = (".metadata", "progress.json")
"""Files of every checkpoint, beside the parts that the metadata names."""
THREADS = 4  # that hash; hashlib lets go of the interpreter


def find(run: Path, step: Step) -> Path:
    """The folder of a published, whole checkpoint of a run.

    step: its iterations; "newest"; or "best", the one with the highest mean training reward since
    the one before, or with the best held-out evaluation where there were some on the way
    Raises UserError where `run` is no run folder, has no such checkpoint, or a file of it is
    missing or cut short.
    """
    if not (run / "recipe.toml").is_file() or not (run / "checkpoints").is_dir():
        raise UserError(
            f"run={run}: no recipe.toml and checkpoints/ there, so not a run folder; give a "
            "run.dir."
        )
    steps = {number(path): path for path in published(run / "checkpoints")}
    if not steps:
        raise UserError(
            f"run={run}: has no checkpoint yet; wait for the first one (checkpoint.every)."
        )
    newest = max(steps)
    if step == "newest":
        step = newest
    elif step == "best":
        name = read_json(steps[newest] / "progress.json").get("best")
        if name is None:
            raise UserError(
                f"--step=best: no checkpoint of {run} has a valid reward; use --step {newest}."
            )
        step = _best(str(name), steps[newest])
    if step not in steps:
        kept = ", ".join(map(str, sorted(steps)))
        raise UserError(f"--step={step}: {run} keeps no such checkpoint; use one of {kept}.")
    check_intact(steps[step])
    return steps[step]


def _best(name: str, newest: Path) -> int:
    """The number of the checkpoint that the newest one calls the best."""
    digits = name.removeprefix("step-")
    if not digits.isdecimal():
        raise UserError(
            f"checkpoint={newest}: progress.json names no checkpoint as the best ({name!r}); "
            "choose another --step."
        )
    return int(digits)


def number(checkpoint: Path) -> int:
    """The iterations that a checkpoint's folder names."""
    return int(checkpoint.name.removeprefix("step-"))


def published(folder: Path) -> list[Path]:
    """The published checkpoints in a folder of checkpoints, the newest first."""
    paths = (path for path in folder.glob("step-*") if path.name[5:].isdecimal())
    return sorted(paths, key=number, reverse=True)


def check_intact(checkpoint: Path) -> None:
    """Compare all files of a checkpoint with its manifest, by size and SHA-256.

    Raises UserError naming one that is missing, cut short or changed.
    """
    problem = wrong_size(checkpoint)
    if problem is None:
        entries = manifest(checkpoint)
        problem = next(changed(checkpoint, entries, entries), None) or unlisted(checkpoint)
    if problem is not None:
        raise UserError(f"checkpoint={checkpoint}: {problem}; choose another --step.")


def manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of each file, by name.

    Raises UserError where it is missing or damaged, or leaves out what every checkpoint has.
    """
    entries = read_json(checkpoint / "manifest.json")
    if not all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and name == Path(name).name
        for name, entry in entries.items()
    ):
        raise UserError(
            f"checkpoint={checkpoint}: manifest.json is not one of this version; choose another "
            "--step."
        )
    if missing := [name for name in ALWAYS if name not in entries]:
        raise UserError(
            f"checkpoint={checkpoint}: manifest.json does not name {missing[0]}, so it was edited "
            "or cut; choose another --step."
        )
    return entries  # type: ignore[return-value]


def wrong_size(checkpoint: Path) -> str | None:
    """The first file that is missing or of another size than the manifest says."""
    for name, entry in manifest(checkpoint).items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
    return None


def changed(
    checkpoint: Path, names: Iterable[str], entries: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """The problem of each of these files that has another SHA-256 than its entry, or none."""

    def problem(name: str) -> str | None:
        try:
            same = sha256(checkpoint / name) == entries[name]["sha256"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if same else f"{name} is not what was written"

    with ThreadPoolExecutor(THREADS) as pool:
        yield from filter(None, pool.map(problem, list(names)))


def unlisted(checkpoint: Path) -> str | None:
    """The problem of metadata that cannot be read, or that names a file without a hash."""
    try:
        metadata = StoredState(checkpoint).read_metadata()
    except ValueError as error:
        return str(error)
    listed = manifest(checkpoint)
    for info in metadata.storage_data.values():
        if info.relative_path not in listed:
            return f"manifest.json does not name {info.relative_path}"
    return None


def read_json(file: Path) -> dict[str, object]:
    """A JSON object of a checkpoint. Raises UserError where it is missing or damaged."""
    content = read_json_or_none(file)
    if content is None:
        raise UserError(
            f"checkpoint={file.parent}: {file.name} is missing or unreadable; choose another "
            "--step."
        )
    return content


class Weights:
    """Reads the network's tensors of one checkpoint, by the names of the unsharded network.

    averaged: whether the tensors are the moving average, which is taken where the run kept one and
    `raw` does not forbid it.
    """

    def __init__(self, checkpoint: Path, raw: bool) -> None:
        self.checkpoint = checkpoint
        self._reader = StoredState(checkpoint)
        try:
            self._metadata = self._reader.read_metadata()
        except ValueError as error:
            raise UserError(f"checkpoint={checkpoint}: {error}; choose another --step.") from None
        self._reader.set_up_storage_reader(self._metadata, True)
        entries = self._metadata.state_dict_metadata
        self.averaged = not raw and any(key.startswith("ema.") for key in entries)
        self._key_of = {
            key.removeprefix("model."): key for key in entries if key.startswith("model.")
        }
        if self.averaged:
            self._key_of |= {
                key.removeprefix("ema."): key for key in entries if key.startswith("ema.")
            }

    @property
    def label(self) -> str:
        """Caption of the weights: "step 30" or "step 30, EMA"."""
        return self.checkpoint.name.replace("-", " ") + (", EMA" if self.averaged else "")

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the network's order."""
        return list(self._key_of)

    def layout(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a tensor, from the metadata."""
        entry = self._metadata.state_dict_metadata[self._key_of[name]]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.size, entry.properties.dtype

    def read(self, name: str) -> Tensor:
        """One whole tensor [...] on the CPU, in the dtype in which it was saved (float32)."""
        shape, dtype = self.layout(name)
        state = {self._key_of[name]: torch.empty(shape, dtype=dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, self._metadata, True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"checkpoint={self.checkpoint}: {name} cannot be read "
                f"({str(error).splitlines()[0]}); a running trainer may have removed it: choose "
                "another --step, or raise checkpoint.keep."
            ) from None
        return state[self._key_of[name]]


def check_names(expected: Mapping[str, torch.Size], trained: set[str], weights: Weights) -> None:
    """Compare a checkpoint with the network that its weights are meant for.

    expected: shape by name of every tensor of the network;
    trained: those that the checkpoint must hold
    Raises UserError naming the first tensor that is missing, unknown or of another shape.
    """
    where = f"checkpoint={weights.checkpoint}"
    remedy = "model.path or model.network is not what the run was trained from."
    for name in weights.names:
        if name not in expected:
            raise UserError(f"{where}: {name} is no tensor of the network; {remedy}")
        shape, _ = weights.layout(name)
        if shape != expected[name]:
            raise UserError(
                f"{where}: {name} is {list(shape)}, but {list(expected[name])} in the network; "
                f"{remedy}"
            )
    if missing := sorted(trained - set(weights.names)):
        raise UserError(f"{where}: has no {missing[0]} (and {len(missing) - 1} more); {remedy}")


@torch.no_grad()
def load_into(network: nn.Module, weights: Weights) -> None:
    """Put a checkpoint's weights into an unsharded network, in the network's own dtypes.

    One tensor at a time is in memory beside the network. What was frozen in training (the base
    weights under adapters) is not in the checkpoint and stays.
    """
    own = network.state_dict()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    check_names({name: tensor.shape for name, tensor in own.items()}, trained, weights)
    for name in weights.names:
        own[name].copy_(weights.read(name))


@torch.no_grad()
def load_shards(network: nn.Module, weights: Weights) -> None:
    """As `load_into`, for a network that is sharded over ranks: each reads its own rows.

    One whole tensor at a time is in host memory beside them.
    """
    own = network.state_dict()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    check_names({name: tensor.shape for name, tensor in own.items()}, trained, weights)
    for name in weights.names:
        local, rows = own_rows(own[name])
        local.copy_(weights.read(name)[rows])
