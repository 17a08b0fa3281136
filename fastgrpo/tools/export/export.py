"""A sharded checkpoint as a folder that `DiffusionPipeline.from_pretrained` loads.

The network's tensors go from the checkpoint's shards to safetensors files one at a time; all other
parts and model_index.json are the base folder's own. No process group, no GPU, and the model is
never whole in memory.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgrpo import models
from fastgrpo.checkpoint import identity, reader
from fastgrpo.checkpoint.reader import Step, Weights
from fastgrpo.core import files
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import world_size
from fastgrpo.models.loading import diffusers_folder as layout_folder
from fastgrpo.models.loading import source, weight_files
from fastgrpo.models.loading.lora import DOWN, UP, merged, save_adapters
from fastgrpo.parallel.precision import stays_float32
from fastgrpo.tools.export import model_card, shard_writer

# of the base folder's top; whole-model files there hold the old weights
COPIED_FILES = ("LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Export:
    """The checkpoint to export and its form."""

    run: Path
    folder: Path
    _: KW_ONLY
    step: Step = "newest"
    raw: bool = False
    lora: Literal["apart", "merged"] | None = None  # None: apart where the run has adapters
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_shard_bytes: int = 5 * 10**9
    link: bool = False  # hard links to the base folder's other parts, in place of copies


def export(wanted: Export) -> Path:
    """Write the folder, whole or not at all.  returns its path

    Raises UserError where the run, the checkpoint, the base folder or the destination is not what
    it should be.
    """
    if world_size() > 1:
        raise UserError("export: runs in one process; start it without torchrun.")
    checkpoint = reader.find(wanted.run, wanted.step)
    identity.check(wanted.run)
    recipe = identity.recipe_of(wanted.run)
    if wanted.lora is not None and not recipe.lora.rank:
        raise UserError(
            f"--lora={wanted.lora}: the run in {wanted.run} trained no adapters; leave it out."
        )
    weights = Weights(checkpoint, wanted.raw)
    with files.whole_folder(wanted.folder, "DST") as partial:
        if recipe.lora.rank and wanted.lora != "merged":
            write_adapters(wanted, recipe, weights, partial)
        else:
            write_pipeline(wanted, recipe, weights, partial)
        (partial / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        card = partial / "README.md"
        model_card.write(card, wanted.run, recipe=recipe, weights=weights, dtype=wanted.dtype)
    return wanted.folder


def write_pipeline(wanted: Export, recipe: Recipe, weights: Weights, partial: Path) -> None:
    """Write the base folder's parts, and the network with the checkpoint's weights."""
    part = models.declared(recipe.model.family, "NETWORK")
    base = source.locate(recipe.model)
    copy_parts(base, part, partial, wanted.link)
    own = layout_folder.network_folder(recipe.model, part)
    name_pipeline(partial / "model_index.json", recipe.model.family)
    network = partial / part
    network.mkdir()
    shutil.copyfile(own / "config.json", network / "config.json")
    described = outline(network / "config.json")
    expected = dict(described.state_dict())
    read: Callable[[str], Tensor] = weights.read
    if recipe.lora.rank:
        read = merged_with(own, adapters(weights), recipe)
    else:
        reader.check_names(
            {name: tensor.shape for name, tensor in expected.items()}, set(expected), weights
        )
    dtype = getattr(torch, wanted.dtype)
    rounded = {  # what diffusers keeps in float32 it wants so in the file too
        name
        for name, tensor in expected.items()
        if tensor.is_floating_point() and not stays_float32(described, name)
    }
    layout = {
        name: (tensor.shape, dtype if name in rounded else tensor.dtype)
        for name, tensor in expected.items()
    }
    shard_writer.write_network(network, layout, read, wanted.max_shard_bytes)


def write_adapters(wanted: Export, recipe: Recipe, weights: Weights, partial: Path) -> None:
    """Write the file that `load_lora_weights` of the family's pipeline looks for in a folder."""
    part = models.declared(recipe.model.family, "NETWORK")
    file, dtype = partial / shard_writer.ADAPTERS, getattr(torch, wanted.dtype)
    save_adapters(adapters(weights), file, part=part, settings=recipe.lora, dtype=dtype)


def adapters(weights: Weights) -> dict[str, Tensor]:
    """The trained adapters of a checkpoint, all at once: A [rank, in] and B [out, rank] by name."""
    return {name: weights.read(name) for name in weights.names if name.endswith((DOWN, UP))}


def merged_with(folder: Path, state: dict[str, Tensor], recipe: Recipe) -> Callable[[str], Tensor]:
    """A reader of the base network's tensors, float32 [...], with the adapters folded in.

    state: A [rank, in] and B [out, rank] by name
    """
    base = shard_writer.open_network(folder)
    return lambda name: merged(name, _float32(base(name)), state, recipe.lora)


def copy_parts(base: Path, network: str, partial: Path, link: bool) -> None:
    """Copy model_index.json, the folders that it names but the network's, and the licence."""
    index = base / "model_index.json"
    parts = [
        name for name, value in layout_folder.read_json(index).items() if isinstance(value, list)
    ]
    if network not in parts:
        raise UserError(
            f"model.path={base}: model_index.json names no {network}; is model.family right?"
        )
    put: Callable[[str, str], Any] = _link if link else shutil.copyfile
    for file in (index, *(file for pattern in COPIED_FILES for file in sorted(base.glob(pattern)))):
        shutil.copyfile(file, partial / file.name)
    for name in parts:
        # an optional part, such as a safety checker, may be null
        if name != network and (base / name).is_dir():
            copy_part(base / name, partial / name, put)


def copy_part(folder: Path, target: Path, put: Callable[[str, str], Any]) -> None:
    """Copy a part, of several forms of its weights the one that was read, under its plain name.

    shutil.copytree would gather the errors and hide a full disk.
    """
    target.mkdir(parents=True)
    for file, name in weight_files.plainly_named(folder).items():
        put(str(file), str(target / name))
    for inner in sorted(folder.iterdir()):
        if inner.is_dir():
            copy_part(inner, target / inner.name, put)


def name_pipeline(index: Path, family: str) -> None:
    """Name the family's own pipeline where the other parts are another family's (SkyReels)."""
    pipeline = models.declared(family, "PIPELINE", None)
    if pipeline is not None:
        content = layout_folder.read_json(index) | {"_class_name": pipeline}
        index.write_text(json.dumps(content, indent=2) + "\n")


def _link(source: str, target: str) -> None:
    """Make a hard link, or a copy on another file system; links of hub folders are followed."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def outline(config_file: Path) -> nn.Module:
    """The network that a config.json describes, float32 on the meta device."""
    import diffusers

    settings = layout_folder.read_json(config_file)
    kind = getattr(diffusers, str(settings.get("_class_name")), None)
    if kind is None:
        raise UserError(
            f"model.path: {config_file} names no diffusers class ({settings.get('_class_name')}); "
            "use a folder that diffusers wrote, or the version of diffusers that did."
        )
    with torch.device("meta"):
        network: nn.Module = kind.from_config(settings)
    return network


def _float32(tensor: Tensor) -> Tensor:
    """The tensor [...] in float32 where it is floating-point."""
    return tensor.float() if tensor.is_floating_point() else tensor
