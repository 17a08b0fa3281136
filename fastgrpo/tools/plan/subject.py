"""What a plan has to know of a model beside the network's blocks, and where that comes from.

Configs are read from the folder that a recipe names, or from the hub's local cache; where neither is there, the
published network of that name is assumed, and the plan says so. Nothing is fetched.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import read_json
from fastgrpo.parallel.mesh import mesh_shape
from fastgrpo.tools.plan.costs import rewards
from fastgrpo.tools.plan.costs.compute import Job
from fastgrpo.tools.plan.network.transformers import FLUX_PATCH, network
from fastgrpo.tools.plan.network.units import Network

HUNYUAN: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768, "rope_axes_dim": (16, 56, 56),
}  # fmt: skip
FLUX_DEV: dict[str, Any] = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True,
}  # fmt: skip
WAN_1_3B = WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
SD_1: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
PUBLISHED: dict[
    str, tuple[tuple[str, dict[str, Any]], ...]
] = {  # parts of a hub id, in lower case, and the network's config; the first that fits, the family's last
    "hunyuan_video": (("", HUNYUAN),),
    "skyreels_i2v": (("", HUNYUAN | {"in_channels": 32}),),
    "flux": (("schnell", FLUX_DEV | {"guidance_embeds": False}), ("", FLUX_DEV)),
    "wan": (("1.3b", WAN_1_3B), ("", WAN_14B)),
    "stable_diffusion": (("", SD_1),),
}


@dataclass(frozen=True)
class Family:
    """Of a family's published folder. Bytes and FLOPs of decoding: `python -m benchmarks.plan.check --calibrate`."""

    part: str  # folder of the network
    space: int  # pixels per latent place and side
    time: int  # frames per latent frame
    channels: int  # of the latent
    text: int  # tokens of the longest text
    encoders: float  # parameters of the text encoders
    vae: float  # parameters of the VAE
    decode_flops: float  # per pixel that a tile covers
    decode_bytes: float  # per pixel of a tile at work, in bfloat16
    tile: tuple[int, int, int] | None = None  # frames, height, width in pixels; none = the whole clip
    stride: tuple[int, int, int] = (1, 1, 1)


VAE_CHANNELS = 128  # of the first level of the published VAEs, to whose size the two numbers above belong
HUNYUAN_FAMILY = Family(
    "transformer", 8, 4, 16, 256, 8.15e9, 0.2465e9, 17.6e6, 2321, (17, 256, 256), (12, 192, 192)
)  # fmt: skip
FAMILIES = {
    "hunyuan_video": HUNYUAN_FAMILY,
    "skyreels_i2v": HUNYUAN_FAMILY,
    "flux": Family("transformer", 8, 1, 16, 512, 4.89e9, 0.0838e9, 9.7e6, 1537),
    "wan": Family("transformer", 8, 4, 16, 512, 5.68e9, 0.1269e9, 8.7e6, 2544, (4, 1288, 1288), (4, 1024, 1024)),
    "stable_diffusion": Family("unet", 8, 1, 4, 77, 0.123e9, 0.0838e9, 9.6e6, 1536),
}


@dataclass(frozen=True)
class Subject:
    """A job, its family's other parts, and what was assumed to make it."""

    job: Job
    family: Family
    notes: tuple[str, ...]


def subject(recipe: Recipe, gpus: int, ranks_per_node: int, text: int | None = None) -> Subject:
    """A recipe on so many GPUs.  text: tokens of the longest text, in place of the family's limit

    Raises UserError for what a run would refuse: a mesh that does not divide, fewer samples than groups of ranks, a
    size that the model cannot take, a reward server that not all nodes reach.
    """
    if recipe.model.family not in FAMILIES:
        raise UserError(f"model.family='{recipe.model.family}': no plan for it; plans know {', '.join(FAMILIES)}.")
    replicas, shards = mesh_shape(recipe.distributed, gpus, min(ranks_per_node, gpus))
    _check_samples(recipe, gpus)
    rewards.check(recipe, gpus, ranks_per_node)
    config, notes = network_config(recipe)
    net = network(recipe.model.family, config)
    family = _family(recipe, notes)
    if net.heads % recipe.distributed.sp and net.heads > 1:
        sizes = ", ".join(str(n) for n in range(1, net.heads + 1) if net.heads % n == 0)
        raise UserError(
            f"distributed.sp={recipe.distributed.sp}: does not divide the network's {net.heads} heads; use one of "
            f"{sizes}."
        )
    if recipe.distributed.sp > 1 and net.blocks[0].kind == "unet":
        raise UserError(f"distributed.sp={recipe.distributed.sp}: a UNet has no sequence parallelism; use 1.")
    latent = _latent(recipe, family, config)
    tokens = text or family.text
    if text is None:
        notes.append(f"texts of {tokens} tokens, the longest; --text-tokens for others")
    job = Job(recipe, net, latent, _tokens(net, latent, config, recipe), tokens, gpus, ranks_per_node, replicas, shards)
    return Subject(job, family, tuple(notes))


def _check_samples(recipe: Recipe, gpus: int) -> None:
    """Raise UserError where a group of ranks would have nothing to do."""
    groups, total = gpus // recipe.distributed.sp, recipe.prompts.per_iteration * recipe.rollout.samples_per_prompt
    if total < groups:
        raise UserError(
            f"prompts.per_iteration={recipe.prompts.per_iteration}: {total} samples per iteration for {groups} groups "
            "of ranks; raise it, rollout.samples_per_prompt or distributed.sp, or use fewer GPUs."
        )


def network_config(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The network's config, and a note where it is not the recipe's own folder's."""
    part, named = FAMILIES[recipe.model.family].part, recipe.model.network or recipe.model.path
    for folder in _folders(named):
        for file in (folder / part / "config.json", folder / "config.json"):
            if file.is_file():
                return read_json(file, "model.path", "download that folder again"), []
    if named.startswith((".", "/", "~")):
        raise UserError(f"model.path={named}: has no {part}/config.json; correct the path, or name a hub id.")
    choices = PUBLISHED[recipe.model.family]
    config = next(config for key, config in choices if key in named.lower())
    return config, [f"{named} is not here: assumed the published network of {recipe.model.family}"]


def _folders(named: str) -> list[Path]:
    """The folder itself, or the hub cache's copies of a repository."""
    if Path(named).is_dir():
        return [Path(named)]
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return sorted((hub / f"models--{named.replace('/', '--')}" / "snapshots").glob("*"))


def _family(recipe: Recipe, notes: list[str]) -> Family:
    """The family's facts with the VAE's own compression, decoding scaled by the VAE's width."""
    family = FAMILIES[recipe.model.family]
    files = [folder / "vae" / "config.json" for folder in _folders(recipe.model.path)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return family
    config = read_json(found, "model.path", "download that folder again")
    widths = config.get("block_out_channels") or [config.get("base_dim", 96) * VAE_CHANNELS / 96]
    space = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    time = config.get("temporal_compression_ratio") or config.get("scale_factor_temporal") or family.time
    channels = config.get("latent_channels") or config.get("z_dim", family.channels)
    space = space or (2 ** (len(widths) - 1) if family.time == 1 else family.space)
    scale = widths[0] / VAE_CHANNELS
    changed = Family(
        family.part, space, time, channels, family.text, family.encoders * scale**2, family.vae * scale**2,
        family.decode_flops * scale**2, family.decode_bytes * scale, family.tile, family.stride,
    )  # fmt: skip
    if scale != 1:
        notes.append("decoding and text encoders of another size than the published: scaled by the VAE's width")
    return changed


def _latent(recipe: Recipe, family: Family, config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(C, F, H, W). Raises UserError for a size that does not divide."""
    video, patch = recipe.video, _patch(recipe, config)
    divides = not (video.height % (family.space * patch) or video.width % (family.space * patch))
    if not divides or (video.frames - 1) % family.time or (family.time == 1 and video.frames != 1):
        from fastgrpo.models.loading import diffusers_folder  # imports torch: for its message alone

        if family.time == 1:
            diffusers_folder.image_only(video, recipe.model.family)
        diffusers_folder.latent_size(video, family.space, family.time, patch)
    frames = (video.frames - 1) // family.time + 1
    return family.channels, frames, video.height // family.space, video.width // family.space


def _patch(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Latent places per token and side."""
    if recipe.model.family == "flux":
        return FLUX_PATCH
    patch = config.get("patch_size", 1)
    return int(patch if isinstance(patch, int) else patch[-1])


def _tokens(net: Network, latent: tuple[int, int, int, int], config: Mapping[str, Any], recipe: Recipe) -> int:
    """Video tokens of a sample; a UNet's are its latent's places."""
    if net.blocks[0].kind == "unet":
        return math.prod(latent[1:])
    return math.prod(latent[1:]) // _patch(recipe, config) ** 2
