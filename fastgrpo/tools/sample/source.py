"""What can be sampled: a recipe's base folder, a checkpoint of a run, or a folder in the diffusers layout.

Sampling trains nothing, so every rank holds the whole network in the compute precision: no masters, no sharding, and no
rank waits for another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastgrpo.checkpoint import reader
from fastgrpo.checkpoint.reader import Step, Weights
from fastgrpo.core import config
from fastgrpo.core.config import Lora, Model, Prompts, Recipe, Rollout, Section, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Policy
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.lora import ADAPTER, DOWN, UP
from fastgrpo.tools.export.shard_writer import ADAPTERS

S = TypeVar("S", bound=Section)

STEPS_WITHOUT_RECIPE = 50


@dataclass(frozen=True)
class Snapshot:
    """A generator's weights as they lie on the disk."""

    model: Model
    lora: Lora
    label: str  # for captions
    checkpoint: Path | None = None  # whose weights take the place of the folder's; none = the folder's own
    raw: bool = False  # not the moving average
    adapters: Path | None = None  # an exported file of adapters, put beside the folder's weights

    def load(self, device: torch.device) -> Policy:
        """The whole policy on `device`, its parameters in the compute precision, as FSDP computes with them."""
        policy = policies.load(self.model, device, self.lora)
        if self.checkpoint is not None:
            reader.load_into(policy.network, Weights(self.checkpoint, self.raw))
        if self.adapters is not None:
            load_adapters(policy.network, self.adapters)
        _compute_precision(policy.network, self.model.torch_dtype)
        policy.network.eval()
        return policy


@dataclass(frozen=True)
class Source:
    """What the first argument of `fastgrpo sample` names."""

    snapshot: Snapshot
    base: Snapshot | None  # what it was trained from; none = it is that, or nobody knows
    video: Video
    steps: int
    shift: float | None
    prompts: Prompts | None  # of the recipe
    count: int  # held-out prompts that the recipe evaluates on
    folder: Path | None  # where samples go by default


@dataclass(frozen=True)
class Asked:
    """Which weights, and what the command line says beside the recipe."""

    source: str
    step: Step = "newest"
    raw: bool = False
    recipe: Path | None = None  # of a folder in the diffusers layout
    family: str | None = None  # the same, without a recipe
    changes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # section -> key -> value, in place of the recipe's
    overrides: tuple[str, ...] = ()  # section.key=value


def find(asked: Asked) -> Source:
    """Settle what is sampled; nothing is loaded. Raises UserError where the source is none of the three."""
    path = Path(asked.source)
    if path.is_file():
        _only_for_runs(asked, "a recipe")
        return _from_recipe(asked, config.load(path, asked.overrides))
    if (path / "recipe.toml").is_file() and (path / ADAPTERS).is_file():
        _only_for_runs(asked, "an export")
        return _from_adapters(asked, path)
    if (path / "recipe.toml").is_file() and not (path / "model_index.json").is_file():
        return _from_run(asked, path)
    if path.suffix == ".toml" or (path.is_dir() and not (path / "model_index.json").is_file()):
        problem = "neither a run folder nor one in the diffusers layout" if path.is_dir() else "no such recipe"
        raise UserError(f"source={path}: {problem}; give a recipe, a run.dir, an export or a model folder.")
    _only_for_runs(asked, "a model folder")
    return _from_folder(asked, path)


def _from_recipe(asked: Asked, recipe: Recipe) -> Source:
    return _source(asked, recipe, Snapshot(_model(recipe, asked), Lora(), "base"), None, None)


def _from_run(asked: Asked, run: Path) -> Source:
    if asked.recipe is not None or asked.family is not None:
        raise UserError(f"source={run}: a run folder has its own recipe; leave out --recipe and --family.")
    checkpoint = reader.find(run, asked.step)
    recipe = config.load(run / "recipe.toml", asked.overrides)
    base = Snapshot(_model(recipe, asked), recipe.lora, "base")
    label = Weights(checkpoint, asked.raw).label
    trained = replace(base, label=label, checkpoint=checkpoint, raw=asked.raw)
    name = checkpoint.name + ("-raw" if asked.raw else "")
    return _source(asked, recipe, trained, base, run / "samples" / name)


def _from_adapters(asked: Asked, folder: Path) -> Source:
    """Adapters exported apart: the recipe of their run names the base model."""
    recipe = config.load(folder / "recipe.toml", asked.overrides)
    base = Snapshot(_model(recipe, asked), Lora(), "base")
    scaled = recipe.lora.model_copy(update={"alpha": None})  # the file's B has alpha / rank in it
    trained = replace(base, lora=scaled, label=folder.name, adapters=folder / ADAPTERS)
    return _source(asked, recipe, trained, base, None)


def _from_folder(asked: Asked, folder: Path) -> Source:
    """A model folder or a hub id; an export brings the recipe of its run along."""
    file = asked.recipe or folder / "recipe.toml"
    if asked.family is not None:
        if asked.recipe is not None or asked.overrides:
            raise UserError("--family: is for a folder without a recipe; leave out --recipe and --set.")
        return _without_recipe(asked, asked.family)
    if not file.is_file():
        raise UserError(f"source={asked.source}: which family? Give --family NAME, or --recipe FILE.")
    recipe = config.load(file, asked.overrides)
    base = Snapshot(_model(recipe, asked), Lora(), "base")
    own = base.model.model_copy(update={"path": asked.source, "network": None})
    return _source(asked, recipe, replace(base, model=own, label=folder.name), base, None)


def _without_recipe(asked: Asked, family: str) -> Source:
    sizes = asked.changes.get("video", {})
    if missing := [key for key in ("frames", "height", "width") if key not in sizes]:
        raise UserError(f"--{missing[0]}: missing; without a recipe, give --frames, --height and --width.")
    named = {"family": family, "path": asked.source}
    model = _checked(config.section(Model, "model", named | dict(asked.changes.get("model", {}))))
    video = config.section(Video, "video", sizes)
    rollout = config.section(
        Rollout, "rollout", {"steps": STEPS_WITHOUT_RECIPE} | dict(asked.changes.get("rollout", {}))
    )
    snapshot = Snapshot(model, Lora(), Path(asked.source).name)
    return Source(snapshot, None, video, rollout.steps, rollout.shift, None, 0, None)


def _source(asked: Asked, recipe: Recipe, snapshot: Snapshot, base: Snapshot | None, folder: Path | None) -> Source:
    video = _changed(recipe.video, "video", asked)
    rollout = _changed(recipe.rollout, "rollout", asked)
    steps = rollout.steps
    if "steps" not in asked.changes.get("rollout", {}):
        steps = recipe.evaluate.steps or rollout.steps
    return Source(snapshot, base, video, steps, rollout.shift, recipe.prompts, recipe.evaluate.prompts, folder)


def _changed(section: S, name: str, asked: Asked) -> S:
    """A section of the recipe with what the command line says in its place."""
    return config.section(type(section), name, section.model_dump() | dict(asked.changes.get(name, {})))


def _model(recipe: Recipe, asked: Asked) -> Model:
    """The recipe's model, changed as asked; what only training needs is off."""
    return _checked(_changed(recipe.model, "model", asked).model_copy(update={"gradient_checkpointing": False}))


def _checked(model: Model) -> Model:
    if model.negative_prompt is not None and model.cfg == 1:
        raise UserError("--negative-prompt: has no effect without guidance; give --cfg above 1, or leave it out.")
    return model


def _only_for_runs(asked: Asked, what: str) -> None:
    for option, given in (("--step", asked.step != "newest"), ("--raw-weights", asked.raw)):
        if given:
            raise UserError(f"{option}: is for a run folder, and source={asked.source} is {what}; leave it out.")


@torch.no_grad()
def load_adapters(network: nn.Module, file: Path) -> None:
    """Put an exported file's adapters into a network that has fresh ones. Raises UserError where they differ."""
    own = {name: p for name, p in network.named_parameters() if name.endswith((DOWN, UP))}
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"source={file}: cannot be read ({error}); export it again.") from None
    state = {name.partition(".")[2].replace(".weight", f".{ADAPTER}.weight"): t for name, t in found.items()}
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in state.items()}:
        raise UserError(
            f"source={file}: the adapters are not those that recipe.toml beside it describes; export again."
        )
    for name, value in state.items():
        own[name].copy_(value)


@torch.no_grad()
def _compute_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters, one at a time; buffers stay as they are, as under FSDP.

    A copy even where nothing is to cast: it lies in memory as torch lays it, and on CPUs the last bits of a product
    depend on that, so weights of a file whose tensors begin elsewhere would not give the same clip.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype, copy=True)
