"""Every mistake in a recipe, and in the files that it names, that shows without loading a model.

All of them at once: what `fastgrpo check` prints. A run refuses the first before it makes its
folder.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastgrpo import models, rewards
from fastgrpo.checkpoint import provenance
from fastgrpo.core import config
from fastgrpo.core.config import Model, Recipe, RewardSpec, paths
from fastgrpo.core.config.checks import failing
from fastgrpo.core.errors import UserError, UserErrors
from fastgrpo.data import prompts
from fastgrpo.data.prompts import Split
from fastgrpo.models.loading import diffusers_folder, source, weight_files
from fastgrpo.parallel.nvme.folder import check_folder
from fastgrpo.run.terminal import open_console
from fastgrpo.tools.check import without_effect
from fastgrpo.tools.plan import subject
from fastgrpo.tools.plan.costs import decoding
from fastgrpo.training import methods
from fastgrpo.training.scoring.sources import check_frames, check_parts, read_token

Checks = list[Callable[[], object]]


def check(file: Path, overrides: list[str]) -> tuple[Recipe, Split]:
    """The recipe and its prompts. Raises UserErrors with a line for each mistake in them."""
    recipe, mistakes = config.load_with_mistakes(file, overrides)
    split: list[Split] = []
    if recipe is not None:
        settings = recipe.prompts
        reading: Checks = [lambda: split.append(prompts.split(settings))]
        mistakes += failing([*_checks(recipe), *reading])
    if mistakes or recipe is None:
        raise UserErrors(list(dict.fromkeys(mistakes)))
    return recipe, split[0]


def refuse(recipe: Recipe) -> None:
    """Raise UserError for the first mistake, before anything is loaded or written.

    Prints a line for each key that the recipe sets in vain.
    """
    mistakes = list(dict.fromkeys(failing(_checks(recipe))))
    if mistakes:
        raise UserErrors(mistakes[:1])
    for line in without_effect.lines(recipe):
        open_console().print(line, highlight=False, markup=False, soft_wrap=True)


def _checks(recipe: Recipe) -> Checks:
    """The checks of everything but the prompts."""
    return [
        partial(methods.check, recipe),
        partial(_check_folder, "run.dir", recipe.run.dir),
        partial(_check_folder, "prompts.cache", recipe.prompts.cache),
        partial(_check_offload, recipe),
        partial(_check_token, recipe),
        partial(_check_start, recipe),
        partial(_check_trackers, recipe),
        partial(models.check, recipe.model.family, recipe.model.path),
        *_of_model(recipe),
        *(one for spec in recipe.rewards for one in _of_reward(recipe, spec)),
    ]


def _of_model(recipe: Recipe) -> Checks:
    """The model's folder, and what of the recipe must fit it."""
    if recipe.model.family not in models.known():
        return [partial(_on_hub, recipe.model, "path")]
    checks: Checks = [
        partial(_check_model_folder, recipe),
        partial(_check_network_folder, recipe),
    ]
    images = partial(_check_images, recipe)
    if recipe.model.family not in models.with_function("plan") or failing(checks):
        return [*checks, images]
    try:
        return [*checks, images, *_of_sizes(recipe)]
    except UserError as error:  # of a config that lacks what it is asked for
        return [*checks, images, partial(_raise, error)]


def _raise(error: UserError) -> None:
    raise error


def _check_folder(key: str, folder: Path | None) -> None:
    """Raise UserError for a folder into which nothing could be written."""
    problem = None if folder is None else paths.folder_problem(folder)
    if problem:
        raise UserError(f"{key}={folder}: {problem}; choose another folder or correct that.")


def _check_offload(recipe: Recipe) -> None:
    """Raise UserError for a folder of masters and moments that is not there."""
    if recipe.distributed.offload_path is not None:
        check_folder(Path(recipe.distributed.offload_path))


def _check_token(recipe: Recipe) -> None:
    """Raise UserError for a token file that gives no token."""
    if recipe.server.token_file is not None:
        read_token(recipe.server.token_file)


def _check_start(recipe: Recipe) -> None:
    """Raise UserError for a start that has no checkpoint, or that the KL term would not know."""
    if recipe.run.start_from is None:
        return
    if recipe.lora.rank and methods.needs_initial_policy(recipe):
        raise UserError(
            f"run.start_from={recipe.run.start_from}: with adapters the divergence would be "
            "measured from the model without them, not from this start; set its weight in "
            "[objective] to 0, or export the start and name it in model.path."
        )
    provenance.start_of(recipe)


def _check_trackers(recipe: Recipe) -> None:
    """Raise UserError for a tracking service whose client is not installed."""
    installs = {"wandb": "wandb", "swanlab": "'fastgrpo[swanlab]'"}
    for name, install in installs.items():
        if getattr(recipe.track, name) and importlib.util.find_spec(name) is None:
            raise UserError(
                f"track.{name}=true: {name} is not installed here; pip install {install}, or set "
                "it to false."
            )


def _check_images(recipe: Recipe) -> None:
    """Raise UserError where the family needs a reference image and none is named, or the reverse."""
    family, column = recipe.model.family, recipe.prompts.image_column
    if column is not None and not models.reads_image(family):
        raise UserError(
            f"prompts.image_column={column}: has no effect, {family} takes no reference image; "
            "leave it out."
        )
    if column is None and models.reads_image(family):
        raise UserError(
            f"prompts.image_column: missing; {family} needs a reference image for each prompt."
        )


def _check_model_folder(recipe: Recipe) -> None:
    """Raise UserError where model.path is no folder of the family's, or its weights are not there.

    Of a hub id only what this machine holds is looked at.
    """
    settings, family = recipe.model, recipe.model.family
    pipelines = models.declared(family, "PIPELINES")
    source.refuse_file(settings, pipelines[0])
    if _on_hub(settings, "path"):
        return
    diffusers_folder.check_pipeline(settings, pipelines, models.fitting, models.known())
    parts = models.declared(family, "PARTS", ())
    folder = diffusers_folder.pipeline_folder(settings, parts)
    for part in parts:
        weight_files.check_shards(folder / part)


def _check_network_folder(recipe: Recipe) -> None:
    """Raise UserError where a trained network's folder or its weights are not there."""
    settings = recipe.model
    if settings.network is None and not Path(settings.path).is_dir():
        return  # told of model.path
    if settings.network is not None:
        source.refuse_file(settings, models.declared(settings.family, "PIPELINES")[0])
    if _on_hub(settings, "path" if settings.network is None else "network"):
        return
    for part in models.networks(settings.family):
        weight_files.check_weights(diffusers_folder.network_folder(settings, part))


def _on_hub(settings: Model, key: str) -> bool:
    """Whether model.path or model.network is fetched from the hub.

    Raises UserError where that is forbidden here, and for a folder that is not there.
    """
    name = settings.source if key == "path" else str(settings.network)
    if Path(name).is_dir():
        return False
    if not paths.is_hub_id(name):
        source.locate(settings, key)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline and not subject.local_folders(name):
        raise UserError(
            f"model.{key}={name}: neither a folder nor in this machine's cache of the hub, and "
            "HF_HUB_OFFLINE is set; correct the path, or fetch it first."
        )
    return True


def _of_sizes(recipe: Recipe) -> Checks:
    """The network's heads, and the VAE's factors: frames, height and width each by itself."""
    config_of, _ = subject.network_config(recipe)
    planned = subject.family_plan(recipe.model.family, config_of)
    auxiliary = subject.auxiliary_models(recipe, planned.auxiliary, [])
    side = auxiliary.space * planned.patch
    fitting = {"frames": 1, "height": side, "width": side}
    videos = [
        recipe.video.model_copy(
            update={name: size for name, size in fitting.items() if name != own}
        )
        for own in fitting
    ]
    return [
        partial(subject.check_sharing, recipe, planned.network.heads),
        partial(decoding.check_graph, recipe, auxiliary),
        *(
            partial(
                subject.latent_shape,
                recipe.model_copy(update={"video": video}),
                auxiliary,
                planned.patch,
            )
            for video in videos
        ),
    ]


def _of_reward(recipe: Recipe, spec: RewardSpec) -> Checks:
    """A reward's name, parts, and, where this machine loads it, its settings and files."""
    elsewhere = spec.where == "server" and bool(spec.urls or recipe.server.urls)
    if spec.file is not None or spec.name not in rewards.known():
        where = f"rewards.{recipe.rewards.index(spec)}.name"
        named: Checks = [partial(rewards.check, spec, where)]
        if elsewhere or failing(named):  # of a file that is not there nothing else can be said
            return [] if elsewhere else named
    checks: Checks = [
        partial(check_frames, recipe, spec),
        partial(_check_parts, spec),
        partial(_check_columns, recipe, spec),
    ]
    if not elsewhere:
        checks.append(partial(rewards.check_settings, spec))
    return checks


def _check_columns(recipe: Recipe, spec: RewardSpec) -> None:
    """Raise UserError for a column of the prompts' rows that a reward reads and that stays here."""
    lacking = [one for one in rewards.columns(spec) if one not in recipe.prompts.reward_columns]
    if lacking:
        raise UserError(
            f"prompts.reward_columns={list(recipe.prompts.reward_columns)}: lacks {lacking[0]}, "
            f"which {spec.name} reads of each prompt's row; add it, or, where the reward takes it, "
            "name a file in rewards.options.rows."
        )


def _check_parts(spec: RewardSpec) -> None:
    """Raise UserError for a weight or threshold of a part that the reward's file does not name."""
    if (parts := rewards.parts(spec)) is not None:
        check_parts(spec, parts)
