"""Preflight's look at the model: the guidance that the network is told, and tiles beside one piece."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from fastgrpo.core import config
from fastgrpo.core.config import Model
from fastgrpo.core.units import GIB
from fastgrpo.data.tiny_world.vae import latents_of
from fastgrpo.models.loading import policies
from fastgrpo.parallel.precision import to_compute_precision
from fastgrpo.parallel.world import World
from fastgrpo.tools.plan.costs import decoding as planned
from fastgrpo.tools.preflight import model
from tests.harness import runs, tiny
from tests.harness.tiny import FOLDER

CPU = torch.device("cpu")


class Told(Exception):
    """The guidance with which a network was called."""


def told(network: torch.nn.Module) -> None:
    """Let the network end with the guidance that it is told."""

    def end(module: Any, args: Any, given: dict[str, Tensor]) -> None:
        raise Told(given["guidance"].tolist())

    network.register_forward_pre_hook(end, with_kwargs=True)


@pytest.mark.parametrize(
    ("dtype", "guidance_dtype", "fed"),
    [("bfloat16", "model", 6016.0), ("bfloat16", "float32", 6000.0), ("float32", "model", 6000.0)],
)
def test_the_networks_guidance_is_the_pipelines_unless_it_is_to_be_exact(
    dtype: str, guidance_dtype: str, fed: float
) -> None:
    settings = Model.model_validate(
        {"family": "hunyuan_video", "path": str(FOLDER), "dtype": dtype}
        | {"guidance_dtype": guidance_dtype}
    )
    policy = policies.load(settings, CPU)
    to_compute_precision(policy.network, settings.torch_dtype)
    told(policy.network)
    condition = {"text": torch.zeros(1, 5, 64), "pooled": torch.zeros(1, 32)}
    x = torch.zeros(1, *policy.latent_shape(tiny.VIDEO))
    with pytest.raises(Told) as ours:
        policy.velocity(x, torch.ones(1), condition)
    assert ours.value.args == ([fed],)
    if guidance_dtype == "model":
        pipeline = HunyuanVideoPipeline.from_pretrained(FOLDER, torch_dtype=settings.torch_dtype)
        told(pipeline.transformer)
        with pytest.raises(Told) as official:
            pipeline(
                prompt_embeds=condition["text"].to(settings.torch_dtype),
                pooled_prompt_embeds=condition["pooled"].to(settings.torch_dtype),
                prompt_attention_mask=torch.ones(1, 5),
                height=32,
                width=32,
                num_frames=9,
            )
        assert ours.value.args == official.value.args


def a_run(world: World, frames: int, height: int) -> tuple[Any, Any]:
    """What the check of tiles reads of a run, and of its short iteration: the tiny world's model at
    clips of this size, 64 pixels wide.
    """
    sizes = [f"video.frames={frames}", f"video.height={height}", "video.width=64"]
    recipe = config.load(runs.RECIPE, sizes)
    policy = policies.load(recipe.model, CPU)
    draws = torch.Generator().manual_seed(0)
    final = torch.randn(1, *policy.latent_shape(recipe.video), generator=draws)
    parts = SimpleNamespace(
        recipe=recipe, world=world, policy=policy, conditions=[{"text": torch.zeros(5, 64)}]
    )
    drawn = SimpleNamespace(slots=[0], final=final)
    return parts, SimpleNamespace(drawn=drawn, plan=SimpleNamespace(group_size=4))


@pytest.mark.parametrize(("frames", "height"), [(17, 64), (5, 272)], ids=["in time", "in space"])
def test_tiles_are_compared_with_one_piece(cpu_world: World, frames: int, height: int) -> None:
    """Against diffusers' own switches for both."""
    parts, done = a_run(cpu_world, frames, height)
    vae, x = parts.policy.vae, done.drawn.final
    vae.enable_tiling()
    shown = {}
    with torch.no_grad():
        shown["tiles"] = vae.decode(x / vae.config.scaling_factor).sample
        vae.disable_tiling()
        vae.use_framewise_decoding = False
        shown["whole"] = vae.decode(x / vae.config.scaling_factor).sample
        vae.use_framewise_decoding = True
    levels = {name: ((f.clamp(-1, 1) + 1) * 127.5).round() for name, f in shown.items()}
    apart = (levels["tiles"] - levels["whole"]).abs()
    assert apart.max() > 0
    (finding,) = model.tiles(parts, done)
    assert finding.green and finding.yellow == bool(apart.max() > model.TILES_BOUND)
    assert f"by {apart.max():.0f} of 255 at most, {apart.mean():.2g} on average" in finding.line
    assert vae.tile_sample_min_height == 256 and vae.tile_sample_min_num_frames == 16


@torch.no_grad()
def test_the_bound_is_above_what_bfloat16_does_to_pixels() -> None:
    policy = policies.load(Model(family="hunyuan_video", path=str(FOLDER)), CPU)
    vae: Any = policy.vae
    x, _ = latents_of(vae, 12, np.random.default_rng(0))
    exact = policy.decode(x, {}).pixels.int()
    vae.to(torch.bfloat16)
    rounded = policy.decode(x, {}).pixels.int()
    worst = int((exact - rounded).abs().max())
    assert 0 < worst <= model.TILES_BOUND


def test_where_one_piece_has_no_room_a_word_says_so(
    cpu_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, done = a_run(cpu_world, 5, 272)
    monkeypatch.setattr(model, "free_memory", lambda device: 2**20)
    (finding,) = model.tiles(parts, done)
    wanted = planned.untiled(model.vae_of(parts.recipe), parts.recipe) / GIB  # type: ignore[arg-type]
    assert finding.green and not finding.yellow
    assert f"not compared with one piece, which takes {wanted:,.1f} GiB" in finding.line


def test_where_one_tile_holds_a_clip_there_is_nothing_to_say(cpu_world: World) -> None:
    assert model.tiles(*a_run(cpu_world, 13, 256)) == []
