"""A sharded checkpoint as a folder that `DiffusionPipeline.from_pretrained` loads.

The network's tensors go from the checkpoint's shards to safetensors files one at a time; all other
parts and model_index.json are the base folder's own. No process group, no GPU, and the model is
never whole in memory.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
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
    """Write the base folder's parts, and the networks with the checkpoint's weights."""
    parts = models.networks(recipe.model.family)
    base = source.locate(recipe.model)
    copy_parts(base, parts, partial, wanted.link)
    name_pipeline(partial / "model_index.json", recipe.model.family)
    described: dict[str, nn.Module] = {}
    for part in parts:
        config = partial / part / "config.json"
        config.parent.mkdir()
        shutil.copyfile(layout_folder.network_folder(recipe.model, part) / config.name, config)
        described[part] = outline(config)
    prefixes = {part: f"{part}." if len(parts) > 1 else "" for part in parts}  # in the checkpoint
    if not recipe.lora.rank:
        shapes = {
            f"{prefixes[part]}{name}": tensor.shape
            for part, network in described.items()
            for name, tensor in network.state_dict().items()
        }
        reader.check_names(shapes, set(shapes), weights)
    for part, network in described.items():
        layout = layout_of(network, getattr(torch, wanted.dtype))
        read = reading(recipe, weights, part, prefixes[part])
        shard_writer.write_network(partial / part, layout, read, wanted.max_shard_bytes)


def layout_of(network: nn.Module, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor in the file; what diffusers keeps in float32 it wants so there
    too.
    """
    expected = network.state_dict()
    rounded = {
        name
        for name, tensor in expected.items()
        if tensor.is_floating_point() and not stays_float32(network, name)
    }
    return {
        name: (tensor.shape, dtype if name in rounded else tensor.dtype)
        for name, tensor in expected.items()
    }


def reading(recipe: Recipe, weights: Weights, part: str, prefix: str) -> Callable[[str], Tensor]:
    """A reader of a part's tensors [...] by their names there, with adapters folded in.

    prefix: of the part's names in the checkpoint
    """
    if not recipe.lora.rank:
        return lambda name: weights.read(f"{prefix}{name}")
    own = layout_folder.network_folder(recipe.model, part)
    return merged_with(own, adapters_of(weights, prefix), recipe)


def write_adapters(wanted: Export, recipe: Recipe, weights: Weights, partial: Path) -> None:
    """Write the file that `load_lora_weights` of the family's pipeline looks for in a folder.

    A second network's is another file, whose names begin with the first's part as well:
    `load_lora_weights` with `load_into_transformer_2=True` takes it so.
    """
    parts, dtype = models.networks(recipe.model.family), getattr(torch, wanted.dtype)
    for part, name in adapter_files(parts).items():
        own = adapters_of(weights, f"{part}." if len(parts) > 1 else "")
        save_adapters(own, partial / name, part=parts[0], settings=recipe.lora, dtype=dtype)


def adapter_files(parts: Sequence[str]) -> dict[str, str]:
    """The file of each trained part's adapters."""
    more = (shard_writer.MORE_ADAPTERS.format(number) for number in range(2, len(parts) + 1))
    return dict(zip(parts, (shard_writer.ADAPTERS, *more), strict=True))


def adapters_of(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """A part's adapters of a checkpoint: A [rank, in] and B [out, rank] by their names in the part.

    prefix: of the part's names in the checkpoint
    """
    own = [name for name in weights.names if name.endswith((DOWN, UP)) and name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.read(name) for name in own}


def merged_with(folder: Path, state: dict[str, Tensor], recipe: Recipe) -> Callable[[str], Tensor]:
    """A reader of the base network's tensors, float32 [...], with the adapters folded in.

    state: A [rank, in] and B [out, rank] by name
    """
    base = shard_writer.open_network(folder)
    return lambda name: merged(name, _float32(base(name)), state, recipe.lora)


def copy_parts(base: Path, networks: Sequence[str], partial: Path, link: bool) -> None:
    """Copy model_index.json, the folders that it names but the networks', and the licence."""
    index = base / "model_index.json"
    parts = [
        name for name, value in layout_folder.read_json(index).items() if isinstance(value, list)
    ]
    for network in networks:
        if network not in parts:
            raise UserError(
                f"model.path={base}: model_index.json names no {network}; is model.family right?"
            )
    put: Callable[[str, str], Any] = _link if link else shutil.copyfile
    for file in (index, *(file for pattern in COPIED_FILES for file in sorted(base.glob(pattern)))):
        shutil.copyfile(file, partial / file.name)
    for name in parts:
        # an optional part, such as a safety checker, may be null
        if name not in networks and (base / name).is_dir():
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
