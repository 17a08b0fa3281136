"""What a plan has to know of a model beside the network's blocks, and where that comes from.

Configs are read from the folder that a recipe names, or from the hub's local cache; where neither
is there, the published network of that name is assumed, and the plan says so. Nothing is fetched.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgrpo import models
from fastgrpo.core.config import Recipe, paths
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json
from fastgrpo.models.sizes import text_encoders
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.parallel.mesh import mesh_shape
from fastgrpo.tools.plan.costs import rewards
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.workload import text_length


@dataclass(frozen=True)
class Subject:
    """A job, the models beside its network, and what was assumed to make it."""

    job: Job
    auxiliary: AuxiliaryModels
    multiple: int  # pixels that height and width are multiples of
    notes: tuple[str, ...]


def subject(recipe: Recipe, gpus: int, ranks_per_node: int, text: int | None = None) -> Subject:
    """A recipe on so many GPUs.  text: tokens of the longest text, in place of the family's limit

    Raises UserError for what a run would refuse: a mesh that does not divide, fewer samples than
    groups of ranks, a size that the model cannot take, a reward server that not all nodes reach.
    """
    check_family(recipe.model.family)
    config, notes = network_config(recipe)
    planned = family_plan(recipe.model.family, config)
    replicas, shards = _checked_mesh(recipe, planned.network.heads, gpus, ranks_per_node)
    auxiliary = auxiliary_models(recipe, planned.auxiliary, notes)
    latent = latent_shape(recipe, auxiliary, planned.patch)
    tokens, video = text or auxiliary.text, math.prod(latent[1:]) // planned.patch**2
    if text is None:
        tokens, note = _text_tokens(recipe, auxiliary)
        notes.append(note)
    job = Job(
        recipe=recipe,
        network=planned.network,
        latent=latent,
        video=video,
        text=tokens,
        gpus=gpus,
        ranks_per_node=ranks_per_node,
        replicas=replicas,
        shards=shards,
    )
    return Subject(job, auxiliary, auxiliary.space * planned.patch, tuple(notes))


def _text_tokens(recipe: Recipe, auxiliary: AuxiliaryModels) -> tuple[int, str]:
    """(tokens of the longest text that the network sees, a note that says so)."""
    found = text_length.longest(recipe.prompts) if auxiliary.trimmed else None
    if found is None or found >= auxiliary.text:
        return auxiliary.text, (
            f"texts of {auxiliary.text} tokens, the longest; --text-tokens for others"
        )
    return found, (
        f"texts of {found} tokens, as many as prompts.train's longest has at "
        f"{text_length.BYTES_PER_TOKEN} bytes each; --text-tokens for others"
    )


def with_recipe(given: Subject, recipe: Recipe) -> Subject:
    """The same network and sizes with a recipe that differs in how they are trained.

    Raises UserError for what a run would refuse, as `subject` does.
    """
    job = given.job
    replicas, shards = _checked_mesh(recipe, job.network.heads, job.gpus, job.ranks_per_node)
    return replace(given, job=replace(job, recipe=recipe, replicas=replicas, shards=shards))


def _checked_mesh(recipe: Recipe, heads: int, gpus: int, ranks_per_node: int) -> tuple[int, int]:
    """(replicas, shards). Raises UserError for a mesh, samples or rewards that a run refuses."""
    mesh = mesh_shape(recipe.distributed, gpus, min(ranks_per_node, gpus))
    text_encoders.check(recipe.model.text_encoders, gpus)
    _check_samples(recipe, gpus)
    rewards.check(recipe, gpus, ranks_per_node)
    check_sharing(recipe, heads)
    return mesh


def check_family(name: str) -> None:
    """Raise UserError for a family without a function plan(config)."""
    planned = models.with_function("plan")
    if name not in planned:
        raise UserError(f"model.family='{name}': no plan for it; plans know {', '.join(planned)}.")


def family_plan(name: str, config: Mapping[str, Any]) -> FamilyPlan:
    """What the family says of a network with this config.

    Raises UserError for a family without a plan, and for a config that lacks what it reads.
    """
    check_family(name)
    try:
        found: FamilyPlan = models.declared(name, "plan")(config)
    except KeyError as error:
        raise UserError(
            f"model.path: the network's config has no {error}; correct model.family or the path."
        ) from None
    return found


def published(name: str, named: str = "") -> dict[str, Any]:
    """The config of a family's published network.  named: the hub id, which says which one"""
    choices = models.declared(name, "PUBLISHED")
    return next(dict(config) for key, config in choices if key in named.lower())


def check_sharing(recipe: Recipe, heads: int) -> None:
    """Raise UserError where ranks cannot share the network's sequences as distributed.sp says."""
    sp, sharing = recipe.distributed.sp, models.with_function("share_sequence")
    if sp > 1 and recipe.model.family not in sharing:
        raise UserError(
            f"distributed.sp={sp}: {recipe.model.family} has no sequence parallelism; use 1. Those "
            "with it: "
            f"{', '.join(sharing)}."
        )
    if heads % sp:
        sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"distributed.sp={sp}: does not divide the network's {heads} heads; use one of {sizes}."
        )


def _check_samples(recipe: Recipe, gpus: int) -> None:
    """Raise UserError where a group of ranks would have nothing to do."""
    groups, total = (
        gpus // recipe.distributed.sp,
        recipe.prompts.per_iteration * recipe.rollout.samples_per_prompt,
    )
    if total < groups:
        raise UserError(
            f"prompts.per_iteration={recipe.prompts.per_iteration}: {total} samples per iteration "
            f"for {groups} groups "
            "of ranks; raise it, rollout.samples_per_prompt or distributed.sp, or use fewer GPUs."
        )


def network_config(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The network's config, and a note where it is not the recipe's own folder's."""
    part, named = (
        models.declared(recipe.model.family, "NETWORK"),
        recipe.model.network or recipe.model.source,
    )
    for folder in local_folders(named):
        for file in (folder / part / "config.json", folder / "config.json"):
            if file.is_file():
                return read_json(file, "model.path", "download that folder again"), []
    if not paths.is_hub_id(named):
        raise UserError(
            f"model.path={named}: has no {part}/config.json; correct the path, or name a hub id."
        )
    return published(recipe.model.family, named), [
        f"{named} is not here: assumed the published network of {recipe.model.family}"
    ]


def local_folders(named: str) -> list[Path]:
    """The folder itself, or the hub cache's copies of a repository: the revision's, else all, its
    newest known state first.
    """
    if Path(named).is_dir():
        return [Path(named)]
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    name, revision = paths.hub_name(named)
    there = hub / f"models--{name.replace('/', '--')}"
    reference = there / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    first = [there / "snapshots" / commit] if commit is not None else []
    first = [folder for folder in first if folder.is_dir()]
    if revision is not None:
        return first
    return list(dict.fromkeys([*first, *sorted((there / "snapshots").glob("*"))]))


def auxiliary_models(
    recipe: Recipe, published: AuxiliaryModels, notes: list[str]
) -> AuxiliaryModels:
    """The published models with the VAE's own compression, decoding scaled by the VAE's width."""
    files = [folder / "vae" / "config.json" for folder in local_folders(recipe.model.source)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return published
    config = read_json(found, "model.path", "download that folder again")
    widths = config.get("block_out_channels") or [config.get("base_dim", published.vae_width)]
    halvings = len(config.get("temperal_downsample") or widths[1:])
    space = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    time = (
        config.get("temporal_compression_ratio")
        or config.get("scale_factor_temporal")
        or published.time
    )
    channels = config.get("latent_channels") or config.get("z_dim", published.channels)
    scale = widths[0] / published.vae_width
    if scale != 1:
        notes.append(
            "decoding and text encoders of another size than the published: scaled by the VAE's "
            "width"
        )
    return replace(
        published,
        space=space or (2**halvings if published.time == 1 else published.space),
        time=time,
        channels=channels,
        encoders=published.encoders * scale**2,
        texts=tuple(text.scaled(scale**2) for text in published.texts),
        vae=published.vae * scale**2,
        decode_flops=published.decode_flops * scale**2,
        decode_bytes=published.decode_bytes * scale,
    )


def latent_shape(recipe: Recipe, vae: AuxiliaryModels, patch: int) -> tuple[int, int, int, int]:
    """(C, F, H, W). Raises UserError for a size that does not divide.

    patch: latent places per token and side
    """
    video = recipe.video
    divides = not (video.height % (vae.space * patch) or video.width % (vae.space * patch))
    if not divides or (video.frames - 1) % vae.time or (vae.time == 1 and video.frames != 1):
        from fastgrpo.models.loading import diffusers_folder  # imports torch: for its message alone

        if vae.time == 1:
            diffusers_folder.image_only(video, recipe.model.family)
        diffusers_folder.latent_size(video, vae.space, vae.time, patch)
    frames = (video.frames - 1) // vae.time + 1
    return vae.channels, frames, video.height // vae.space, video.width // vae.space
