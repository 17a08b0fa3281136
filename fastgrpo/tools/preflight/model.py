"""Preflight's checks of the model around the network: the guidance that it is told, and its VAE's
pixels, in tiles and in one piece.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.memory import free_memory
from fastgrpo.core.policy import Condition, Policy, stack
from fastgrpo.core.units import GIB
from fastgrpo.models.sizes.family_plan import AuxiliaryModels
from fastgrpo.tools.plan import subject
from fastgrpo.tools.plan.costs import decoding as planned_decoding
from fastgrpo.tools.preflight.finding import Finding, Parts, gathered
from fastgrpo.tools.preflight.iteration import Iteration

TILES_BOUND = 10
"""Levels of 255 by which a pixel may differ between a clip in tiles and in one piece.

Less than that moves the tiny world's pixels when its VAE decodes in bfloat16 in place of float32,
which runs do without harm. What tiles do beyond that lies along their edges, where a judge at full
resolution sees it.
"""
TILE_SIZES = (
    "tile_sample_min_height",
    "tile_sample_min_width",
    "tile_sample_min_num_frames",
    "tile_latent_min_size",
)
"""Attributes of diffusers' VAEs: a clip that is larger is decoded in tiles."""


def guidance(parts: Parts, done: Iteration) -> list[Finding]:
    """What the network is told of embedded guidance; nothing where it takes none."""
    if done.guidance is None:
        return []
    settings = parts.recipe.model
    named = "the family's" if settings.guidance is None else f"{settings.guidance:g}"
    message = f"the network is told {done.guidance:g} (model.guidance: {named}, {settings.dtype})"
    return [Finding("guidance", True, message)]


def decoding(parts: Parts, done: Iteration) -> Finding:
    """Check that latents are finite and pixels of the recipe's size and more than one colour."""
    video, world = parts.recipe.video, parts.world
    expected = (video.frames, video.height, video.width, 3)
    pixels = done.decoded.pixels
    rows = pixels.flatten(1) if len(pixels) else torch.zeros(0, 1)
    flat = int((rows.amax(1) == rows.amin(1)).sum()) if len(rows) else 0
    form: tuple[str, tuple[int, ...]] = ("torch.uint8", expected)
    if len(rows):
        form = (str(pixels.dtype), tuple(pixels.shape[1:]))
    lost = int((~done.decoded.finite).sum())
    everyone = gathered((form, flat, done.finite, lost, len(rows)), world)
    forms = [form for form, *_ in everyone if form != ("torch.uint8", expected)]
    flat, lost, clips = (sum(own[n] for own in everyone) for n in (1, 3, 4))  # type: ignore[misc]
    remedy = "compare model.path's vae and scheduler with the published ones, and model.dtype"
    problem = ""
    if not all(finite for _, _, finite, *_ in everyone):
        problem = "the rollout's latents are not finite"
    elif lost:
        problem = f"the VAE gives pixels that are not finite for {lost} of {clips} clips"
    elif forms:
        kind, shape = forms[0]
        problem = f"clips are {kind} {list(shape)} instead of uint8 {list(expected)}"
    elif flat:
        problem = f"{flat} of {clips} clips are one colour"
    if problem:
        return Finding("decode", False, problem, remedy)
    message = f"{clips} clip{'s' * (clips > 1)} of {list(expected)}, finite, none of one colour"
    return Finding("decode", True, message)


def tiles(parts: Parts, done: Iteration) -> list[Finding]:
    """Compare one clip of each rank decoded in tiles with the same in one piece.

    Nothing where one tile holds a clip; where one piece has no room, by the plan's number, only a
    word on that.
    """
    recipe, world = parts.recipe, parts.world
    published = vae_of(recipe)
    if published is None or not planned_decoding.in_tiles(published, recipe.video):
        return []
    wanted = planned_decoding.untiled(published, recipe)
    free = min(gathered(free_memory(world.device), world))
    if wanted > free:
        message = f"not compared with one piece, which takes {wanted / GIB:,.1f} GiB by the plan, "
        return [Finding("tiles", True, f"{message}where {free / GIB:,.1f} are free")]
    number = done.drawn.slots[0] // done.plan.group_size
    about = stack([parts.conditions[number]])
    everyone = gathered(difference(parts.policy, done.drawn.final[:1], about), world)
    most, mean = max(one for one, _ in everyone), max(one for _, one in everyone)
    message = f"pixels differ from one piece's by {most} of 255 at most, {mean:.2g} on average"
    remedy = "a judge at full resolution sees seams: smaller or shorter clips ([video]) that one "
    remedy += "tile holds, or rewards that shrink clips first"
    return [Finding("tiles", True, f"{message}, bound {TILES_BOUND}", remedy, most > TILES_BOUND)]


def vae_of(recipe: Recipe) -> AuxiliaryModels | None:
    """What plans know of the recipe's VAE; None: nothing."""
    try:
        config, _ = subject.network_config(recipe)
        beside = subject.family_plan(recipe.model.family, config).auxiliary
        return subject.auxiliary_models(recipe, beside, [])
    except UserError:  # of a family without a plan
        return None


def difference(policy: Policy, x: Tensor, condition: Condition) -> tuple[int, float]:
    """How much decoding in tiles differs from decoding in one piece, in levels of 255.

    x: latents [B, C, F, H, W] float32;  returns the largest and the mean difference of a pixel
    """
    in_tiles = policy.decode(x, condition).pixels
    with _in_one_piece(policy.vae):
        whole = policy.decode(x, condition).pixels
    apart = (in_tiles.to(torch.int16) - whole.to(torch.int16)).abs()
    return int(apart.max()), apart.float().mean().item()


@contextmanager
def _in_one_piece(vae: Any) -> Iterator[None]:
    """Let no clip be too large for one tile inside."""
    before = {name: getattr(vae, name) for name in TILE_SIZES if hasattr(vae, name)}
    for name in before:
        setattr(vae, name, 2**30)
    try:
        yield
    finally:
        for name, size in before.items():
            setattr(vae, name, size)
