"""Stable Diffusion 3 medium, 3.5 medium and 3.5 large, text-to-image (Esser et al. 2024, arXiv
2403.03206; Stability AI 2024).

diffusers' unmodified classes, but for the attention's processor, which dispatches to a kernel of
choice. Text is two CLIPs' states and T5's, of all token places, padding included, without a mask.
Classifier-free guidance runs both branches as one batch; skip-layer guidance is left out, as
diffusers' pipeline leaves it out unless asked.

Times are those that the folder's scheduler sets by itself: they fall to its smallest one (.0089 at
a shift of 3) before the last step, which goes from there to 0. The network is told 1000 t.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention as AttentionModule
from torch import Tensor, nn

from fastgrpo import models
from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models import flux
from fastgrpo.models.attention.joint_without_rotary import JointAttention, SharedAttention
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.loading.schedule import EULER, Schedule
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.sizes.text_encoders import CLIP_G, CLIP_L, T5_XXL
from fastgrpo.models.sizes.transformer_blocks import TIME_CHANNELS, JointBlock, Kept
from fastgrpo.models.sizes.units import (
    ATTENDING,
    ATTENDING_TEXT,
    BOTH,
    SAMPLE,
    TEXT,
    VIDEO,
    Attention,
    Network,
    Unit,
)
from fastgrpo.models.text_encoders.t5_and_two_clips import TextEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = ("vae", *TEXTS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
PIPELINES = ("StableDiffusion3Pipeline",)  # whose folders this family reads
MAX_TEXT_TOKENS = 256  # T5's; the pipeline's own number
MAX_CLIP_TOKENS = 77
MEDIUM: dict[str, Any] = {  # 3.5
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE = MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
FIRST = MEDIUM | {"pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
PUBLISHED = (("3.5-large", LARGE), ("3-medium", FIRST), ("", MEDIUM))
"""Parts of a hub id, in lower case, and the network's config; a plan takes the first that fits."""
KEPT = {  # bytes per token and channel, by the bytes of a number
    2: Kept((22.0, 20.0), (56.1, 56.1), (66.1, 59.8), 4.0, moved=(140.4, 130.4)),
    4: Kept((44.0, 40.0), (96.1, 96.1), (116.1, 99.6), 8.0),
}
KEPT_BY_TWO = {  # of blocks with a second attention, to the image alone
    2: Kept((26.0, 20.0), (84.2, 56.1), (94.2, 59.8), 4.0, moved=(226.8, 130.4)),
    4: Kept((52.0, 40.0), (136.2, 96.1), (156.2, 99.6), 8.0),
}
AUXILIARY = replace(
    models.declared("flux", "AUXILIARY"),
    text=MAX_CLIP_TOKENS + MAX_TEXT_TOKENS,
    encoders=5.58e9,
    texts=(
        CLIP_L.read_as("text_encoder", texts=32, longest=MAX_CLIP_TOKENS, states=True),
        CLIP_G.read_as("text_encoder_2", texts=32, longest=MAX_CLIP_TOKENS, states=True),
        T5_XXL.read_as("text_encoder_3", texts=32, longest=MAX_TEXT_TOKENS),
    ),
)


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""
    layout.after(network.pos_embed, layout.split_tokens)
    layout.after(network.proj_out, layout.gather_tokens)
    for attention in attentions(network):
        layout.process(attention, SharedAttention)


def attentions(network: nn.Module) -> list[Any]:
    """The attention modules: one of each block, and the image-only ones of the first blocks."""
    return [module for module in network.modules() if isinstance(module, AttentionModule)]


class StableDiffusion3:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(
        self, network: nn.Module, vae: nn.Module, schedule: Schedule, settings: Model
    ) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        for attention in attentions(network):
            attention.set_processor(JointAttention())
        self.vae = vae
        self.schedule = schedule
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        diffusers_folder.image_only(video, "Stable Diffusion 3")
        config: Any = self.vae.config
        net: Any = self.network.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        size = diffusers_folder.latent_size(video, factor, 1, net.patch_size)
        most = net.pos_embed_max_size * net.patch_size * factor
        for name, side in (("height", video.height), ("width", video.width)):
            if side > most:
                raise UserError(
                    f"video.{name}={side}: above {most} pixels, for which the network has "
                    "positions; use fewer."
                )
        return config.latent_channels, *size

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        return self.schedule.grid(steps, shift)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, 1, H, W] float32;  t: [B];  returns like x
        """
        if self.cfg == 1:
            return self._predict(x, t, condition)
        assert self.negative is not None
        both = {
            name: torch.cat([self.negative[name].expand_as(own), own])
            for name, own in condition.items()
        }
        without, with_text = self._predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + self.cfg * (with_text - without)

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One forward of the network.  x: [B, C, 1, H, W];  returns like x"""
        (v,) = self.network(
            hidden_states=x.squeeze(2).to(self.dtype),
            encoder_hidden_states=condition["text"].to(self.dtype),
            pooled_projections=condition["pooled"].to(self.dtype),
            timestep=t * self.schedule.timesteps,
            return_dict=False,
        )
        return v.float().unsqueeze(2)

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, 1, H, W] float32 to the VAE's frames [B, 3, 1, H, W], about -1 to 1."""
        return flux.frames_of(self.vae, x)

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, 1, H, W] float32 to pixels, uint8 [B, 1, H, W, 3]."""
        at_once = self.decode_batch or diffusers_folder.images_at_once(self.vae, x)
        return diffusers_folder.decode(self.frames, x, condition, at_once)


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoders of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    texts = TextEncoder(where, settings.torch_dtype, device, MAX_TEXT_TOKENS)
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's blocks."""
    return [*network.transformer_blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> StableDiffusion3:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    diffusers_folder.refuse_guidance(settings, "Stable Diffusion 3")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    scheduler = diffusers_folder.scheduler_config(where)
    schedule = Schedule(scheduler, (EULER,), "Stable Diffusion 3")
    vae = diffusers_folder.read(AutoencoderKL, where / "vae", settings.torch_dtype)
    network = diffusers_folder.network_folder(settings, NETWORK)
    check_network(diffusers_folder.read_json(network / "config.json"), where, vae.config, settings)
    network = streaming.outline(SD3Transformer2DModel, network, device)
    return StableDiffusion3(
        network, vae.requires_grad_(False).eval().to(device), schedule, settings
    )


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    if vae.get("shift_factor") is None:
        raise UserError(
            f"{named}: vae/config.json has no shift_factor, which Stable Diffusion 3's has; correct"
            " model.family."
        )
    taken = config.get("in_channels")
    given = config.get("out_channels", 16)
    if not taken == given == vae.latent_channels:
        raise UserError(
            f"{named}: the network has {taken} channels in and {given} out, the VAE "
            f"{vae.latent_channels}; use a text-to-image Stable Diffusion 3 or 3.5."
        )
    wide = [diffusers_folder.read_json(where / part / "config.json") for part in TEXTS]
    made = [wide[2].get("d_model"), sum(clip.get("projection_dim", 0) for clip in wide[:2])]
    widths = [config.get(key) for key in ("joint_attention_dim", "pooled_projection_dim")]
    if widths != made:
        raise UserError(
            f"{named}: the network takes text of widths {widths[0]} and {widths[1]}, the text "
            f"encoders make {made[0]} and {made[1]}; the parts are of different models."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return FamilyPlan(
        network=_sizes(config),
        patch=config["patch_size"],
        auxiliary=AUXILIARY,
        text_width=config["joint_attention_dim"],
        pooled_width=config["pooled_projection_dim"],
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """SD3Transformer2DModel of a config, written down."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, sides = heads * head, (config["patch_size"],) * 2
    rest = Unit("")
    rest.conv("pos_embed.proj", config["in_channels"], width, sides)
    rest.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    rest.embedder("time_text_embed.text_embedder", config["pooled_projection_dim"], width)
    rest.linear(
        "context_embedder", config["joint_attention_dim"], config["caption_projection_dim"], TEXT
    )
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, config["out_channels"] * math.prod(sides), VIDEO)
    repeated = tuple(_block_sizes(config, number) for number in range(config["num_layers"]))
    return Network(blocks=repeated, rest=rest, width=width, heads=heads)


def _block_sizes(config: Mapping[str, Any], number: int) -> JointBlock:
    """One block: joint attention, an image-only one in some, and feed-forwards of both.

    The last one gives no text, of which it has queries, keys and values alone.
    """
    head = config["attention_head_dim"]
    width, two = config["num_attention_heads"] * head, number in config["dual_attention_layers"]
    last = number == config["num_layers"] - 1
    unit = JointBlock(f"transformer_blocks.{number}", kept=KEPT_BY_TWO if two else KEPT)
    unit.linear("norm1.linear", width, (9 if two else 6) * width, SAMPLE)
    unit.linear("norm1_context.linear", width, (2 if last else 6) * width, SAMPLE)
    for layer in ATTENDING:
        unit.linear(f"attn.{layer}", width, width, VIDEO)
        if two:
            unit.linear(f"attn2.{layer}", width, width, VIDEO)
    for layer in ATTENDING_TEXT[:3] if last else ATTENDING_TEXT:
        unit.linear(f"attn.{layer}", width, width, TEXT)
    if config.get("qk_norm") is not None:
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        for name in (*(f"attn.{n}" for n in names), *(f"attn2.{n}" for n in names[: 2 * two])):
            unit.norm(name, head)
    unit.attentions.append(Attention(width=width, queries=BOTH, keys=BOTH))
    if two:
        unit.attentions.append(Attention(width=width, queries=VIDEO, keys=VIDEO))
    unit.feed_forward("ff", width, 4 * width, VIDEO)
    if not last:
        unit.feed_forward("ff_context", width, 4 * width, TEXT)
    return unit


def simulated(config: Mapping[str, Any], settings: Model) -> StableDiffusion3:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    schedule: Any = SimpleNamespace(timesteps=1000)
    network = SD3Transformer2DModel(**config).train()
    return StableDiffusion3(network, nn.Module(), schedule, settings)
