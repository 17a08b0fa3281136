"""Sources of weights: a recipe's base folder, a checkpoint of a run, a diffusers folder.

Sampling trains nothing, so every rank holds the whole network in the compute precision: no masters,
no sharding, and no rank waits for another.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastgrpo.checkpoint import identity, reader
from fastgrpo.checkpoint.reader import Step, Weights
from fastgrpo.core import config
from fastgrpo.core.config import Lora, Model, Prompts, Recipe, Rollout, Section, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import refuse_lfs_pointer
from fastgrpo.core.policy import Policy, networks_of
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.lora import ADAPTER, DOWN, UP
from fastgrpo.tools.export.export import adapter_files
from fastgrpo.tools.export.shard_writer import ADAPTERS

S = TypeVar("S", bound=Section)

STEPS_WITHOUT_RECIPE = 50


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A generator's weights as they lie on the disk."""

    model: Model
    lora: Lora
    label: str  # for captions
    # whose weights replace the folder's; None: the folder's own
    checkpoint: Path | None = None
    raw: bool = False  # not the moving average
    adapters: Path | None = None  # an exported file of adapters, put beside the folder's weights

    def load(self, device: torch.device) -> Policy:
        """The whole policy on `device`, its parameters in the compute precision, as under FSDP.

        They are read straight into it, so that the GPU never holds more. Buffers stay float32.
        """
        policy = policies.load(self.model, device, self.lora, self.model.torch_dtype)
        if self.checkpoint is not None:
            reader.load_into(policy.network, Weights(self.checkpoint, self.raw))
        if self.adapters is not None:
            load_adapters(policy.network, self.adapters)
        policy.network.eval()
        return policy


@dataclass(frozen=True, kw_only=True)
class Source:
    """The weights that the first argument of `fastgrpo sample` names, and how to sample."""

    snapshot: Snapshot
    video: Video
    steps: int
    shift: float | None
    # the weights before training; None: the snapshot is the base, or the base is unknown
    base: Snapshot | None = None
    prompts: Prompts | None = None  # of the recipe
    count: int = 0  # held-out prompts that the recipe evaluates on
    folder: Path | None = None  # where samples go by default


@dataclass(frozen=True)
class Asked:
    """The weights that the command line names, and what it says beside the recipe."""

    source: str
    _: KW_ONLY
    step: Step = "newest"
    raw: bool = False
    recipe: Path | None = None  # of a folder in the diffusers layout
    family: str | None = None  # the same, without a recipe
    # section -> key -> value, in place of the recipe's
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()  # section.key=value


def find(choice: Asked) -> Source:
    """The source that the command line names; nothing is loaded.

    Raises UserError where the source is none of the three.
    """
    path = Path(choice.source)
    if path.is_file():
        _only_for_runs(choice, "a recipe")
        return _from_recipe(choice, config.load(path, choice.overrides))
    if (path / "recipe.toml").is_file() and (path / ADAPTERS).is_file():
        _only_for_runs(choice, "an export")
        return _from_adapters(choice, path)
    if (path / "recipe.toml").is_file() and not (path / "model_index.json").is_file():
        return _from_run(choice, path)
    if path.suffix == ".toml" or (path.is_dir() and not (path / "model_index.json").is_file()):
        problem = (
            "neither a run folder nor one in the diffusers layout"
            if path.is_dir()
            else "no such recipe"
        )
        raise UserError(
            f"source={path}: {problem}; give a recipe, a run.dir, an export or a model folder."
        )
    _only_for_runs(choice, "a model folder")
    return _from_folder(choice, path)


def _from_recipe(choice: Asked, recipe: Recipe) -> Source:
    return _source(choice, recipe, _base(choice, recipe))


def _base(choice: Asked, recipe: Recipe) -> Snapshot:
    return Snapshot(model=_model(recipe, choice), lora=Lora(), label="base")


def _from_run(choice: Asked, run: Path) -> Source:
    if choice.recipe is not None or choice.family is not None:
        raise UserError(
            f"source={run}: a run folder has its own recipe; leave out --recipe and --family."
        )
    checkpoint = reader.find(run, choice.step)
    identity.check(run)
    recipe = identity.recipe_of(run, choice.overrides)
    base = replace(_base(choice, recipe), lora=recipe.lora)
    label = Weights(checkpoint, choice.raw).label
    trained = replace(base, label=label, checkpoint=checkpoint, raw=choice.raw)
    name = checkpoint.name + ("-raw" if choice.raw else "")
    source = _source(choice, recipe, trained)
    return replace(source, base=base, folder=run / "samples" / name)


def _from_adapters(choice: Asked, folder: Path) -> Source:
    """Adapters exported apart: the recipe of their run names the base model."""
    recipe = identity.recipe_of(folder, choice.overrides)
    base = _base(choice, recipe)
    scaled = recipe.lora.model_copy(update={"alpha": None})  # the file's B has alpha / rank in it
    trained = replace(base, lora=scaled, label=folder.name, adapters=folder / ADAPTERS)
    return replace(_source(choice, recipe, trained), base=base)


def _from_folder(choice: Asked, folder: Path) -> Source:
    """A model folder or a hub id; an export brings the recipe of its run along."""
    named, file = choice.recipe, choice.recipe or folder / "recipe.toml"
    if choice.family is not None:
        if choice.recipe is not None or choice.overrides:
            raise UserError(
                "--family: is for a folder without a recipe; leave out --recipe and --set."
            )
        return _without_recipe(choice, choice.family)
    if named is None and not folder.exists():
        raise UserError(
            f"source={choice.source}: no such file or folder; give a recipe, a run folder, an "
            "export or a model folder, or, for a hub id, --family or --recipe, too."
        )
    if not file.is_file():
        raise UserError(
            f"source={choice.source}: which family? Give --family NAME, or --recipe FILE."
        )
    recipe = (
        identity.recipe_of(folder, choice.overrides)
        if named is None
        else config.load(named, choice.overrides)
    )
    base = _base(choice, recipe)
    own = base.model.model_copy(update={"path": choice.source, "network": None})
    exported = replace(base, model=own, label=folder.name)
    return replace(_source(choice, recipe, exported), base=base)


def _without_recipe(choice: Asked, family: str) -> Source:
    sizes = choice.changes.get("video", {})
    if missing := [key for key in ("frames", "height", "width") if key not in sizes]:
        raise UserError(
            f"--{missing[0]}: missing; without a recipe, give --frames, --height and --width."
        )
    named = {"family": family, "path": choice.source}
    model = _checked(config.section(Model, "model", named | dict(choice.changes.get("model", {}))))
    video = config.section(Video, "video", sizes)
    rollout = config.section(
        Rollout,
        "rollout",
        {"steps": STEPS_WITHOUT_RECIPE} | dict(choice.changes.get("rollout", {})),
    )
    snapshot = Snapshot(model=model, lora=Lora(), label=Path(choice.source).name)
    return Source(snapshot=snapshot, video=video, steps=rollout.steps, shift=rollout.shift)


def _source(choice: Asked, recipe: Recipe, snapshot: Snapshot) -> Source:
    """A source with a recipe, without a base and a folder."""
    video = _changed(recipe.video, "video", choice)
    rollout = _changed(recipe.rollout, "rollout", choice)
    steps = rollout.steps
    if "steps" not in choice.changes.get("rollout", {}):
        steps = recipe.evaluate.steps or rollout.steps
    return Source(
        snapshot=snapshot,
        video=video,
        steps=steps,
        shift=rollout.shift,
        prompts=recipe.prompts,
        count=recipe.evaluate.prompts,
    )


def _changed(section: S, name: str, choice: Asked) -> S:
    """A section of the recipe with what the command line says in its place."""
    return config.section(
        type(section), name, section.model_dump() | dict(choice.changes.get(name, {}))
    )


def _model(recipe: Recipe, choice: Asked) -> Model:
    """The recipe's model, changed as the command line says; what only training needs is off."""
    return _checked(
        _changed(recipe.model, "model", choice).model_copy(update={"gradient_checkpointing": False})
    )


def _checked(model: Model) -> Model:
    if model.negative_prompt is not None and model.cfg == 1:
        raise UserError(
            "--negative-prompt: has no effect without guidance; give --cfg above 1, or leave it "
            "out."
        )
    return model


def _only_for_runs(choice: Asked, what: str) -> None:
    for option, given in (("--step", choice.step != "newest"), ("--raw-weights", choice.raw)):
        if given:
            raise UserError(
                f"{option}: is for a run folder, and source={choice.source} is {what}; leave it "
                "out."
            )


@torch.no_grad()
def load_adapters(network: nn.Module, file: Path) -> None:
    """Put an exported file's adapters into a network that has fresh ones, of several one each.

    Raises UserError where they differ.
    """
    networks = networks_of(network).values()
    files = adapter_files([str(number) for number in range(len(networks))]).values()
    for one, name in zip(networks, files, strict=True):
        _load_adapters(one, file.with_name(name) if len(networks) > 1 else file)


def _load_adapters(network: nn.Module, file: Path) -> None:
    """Put the adapters of one file into one network."""
    own = {name: p for name, p in network.named_parameters() if name.endswith((DOWN, UP))}
    refuse_lfs_pointer(file, f"source={file}")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"source={file}: cannot be read ({error}); export it again.") from None
    state = {
        name.partition(".")[2].replace(".weight", f".{ADAPTER}.weight"): t
        for name, t in tensors.items()
    }
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in state.items()}:
        raise UserError(
            f"source={file}: the adapters are not those that recipe.toml beside it describes; "
            "export again."
        )
    for name, value in state.items():
        own[name].copy_(value)
