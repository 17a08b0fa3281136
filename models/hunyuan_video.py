"""HunyuanVideo, text-to-video and, with one frame, text-to-image.

Kong et al. 2024, arXiv 2412.03603.

diffusers' unmodified classes, and the embedded guidance of the distilled checkpoint. One departure
from diffusers' pipeline, which is exact: text is trimmed to its own length and blocks attend
without a mask (a batch never mixes lengths), so that the fastest attention kernels apply. The
network takes guidance times 1000, which the pipeline multiplies in the compute precision: in
bfloat16 6.0 becomes 6016. So does this one, unless model.guidance_dtype says otherwise.
Classifier-free guidance runs both branches as one batch; where their texts differ in length the
shorter is padded, and each branch attends by itself, to its own text alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models.attention.trimmed import SharedAttention, TrimmedAttention
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import CLIP_L, LLAMA_3_8B
from fastgrpo.models.sizes.transformer_blocks import (
    TIME_CHANNELS,
    Kept,
    joint_blocks,
    token_refiner,
)
from fastgrpo.models.sizes.units import SAMPLE, VIDEO, Network, Unit
from fastgrpo.models.text_encoders.llama_and_clip import TextEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2")
PIPELINES = ("HunyuanVideoPipeline",)  # whose folders this family reads
USUAL_GUIDANCE = 6.0
GUIDANCE_TIMES_1000 = True
MAX_TEXT_TOKENS = 256
MAX_CLIP_TOKENS = 77
# latent height or width from which the VAE decodes in tiles: untiled, its attention does not fit
TILED_ABOVE = 32
CHANNELS: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
}
TEXT_WIDTHS: dict[str, Any] = {
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
DEPTH: dict[str, Any] = {
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
}
HEADS: dict[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "rope_axes_dim": (16, 56, 56),
}
PUBLISHED = (("", CHANNELS | TEXT_WIDTHS | DEPTH | HEADS),)
"""Parts of a hub id, in lower case, and the network's config; a plan takes the first that fits."""
DUAL_KEPT = {  # bytes per token and channel, by the bytes of a number
    2: Kept((22.0, 6.0), (56.1, 56.1), (66.1, 48.0), 2.0, moved=(246.4, 130.4)),
    4: Kept((44.0, 12.0), (112.1, 96.1), (132.1, 75.0), 4.0),
}
SINGLE_KEPT = {
    2: Kept((34.0, 20.0), (54.1, 54.1), (68.1, 68.1), moved=(242.4, 136.4)),
    4: Kept((60.0, 60.0), (108.1, 100.1), (136.1, 128.1)),
}
AUXILIARY = AuxiliaryModels(
    space=8,
    time=4,
    channels=16,
    text=MAX_TEXT_TOKENS,
    trimmed=True,
    encoders=8.15e9,
    texts=(
        CLIP_L.read_as("text_encoder_2", texts=32, longest=MAX_CLIP_TOKENS),
        LLAMA_3_8B.read_as(
            "text_encoder", texts=32, longest=95 + MAX_TEXT_TOKENS, around=95, states=True
        ),
    ),
    vae=0.2465e9,
    decode_flops=17.6e6,
    decode_bytes=2321,
    graph_bytes=13378,
    tile=(17, 256, 256),
    stride=(12, 192, 192),
    uncut_frames=13,  # diffusers compares 16 frames' latents, 4, and takes one more into a tile
)


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""

    def split_table(table: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """[N, D] each to [n, D]"""
        part = layout.sp.part(len(table[0]))
        return tuple(of[part.start : part.stop] for of in table)

    layout.after(network.rope, split_table)
    layout.after(network.x_embedder, layout.split_tokens)
    layout.after(network.proj_out, layout.gather_tokens)
    for block in blocks(network):
        layout.process(block.attn, SharedAttention)


class HunyuanVideo:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(
        self, network: nn.Module, vae: nn.Module, shift: float, settings: Model, guidance: float
    ) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.guidance = guidance
        exact = settings.guidance_dtype == "float32"
        self.guidance_dtype = torch.float32 if exact else settings.torch_dtype
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch
        self.shift = shift
        self.attention = TrimmedAttention()
        for block in self.blocks:
            block.attn.set_processor(self.attention)  # type: ignore[operator, union-attr]

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        config: Any = self.vae.config
        net: Any = self.network.config
        size = diffusers_folder.latent_size(
            video,
            config.spatial_compression_ratio,
            config.temporal_compression_ratio,
            net.patch_size,
        )
        return net.out_channels, *size

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        return transitions.time_grid(steps, shift or self.shift)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        if self.cfg == 1:
            return self._predict(
                x, t=t, text=condition["text"], pooled=condition["pooled"], lengths=()
            )
        assert self.negative is not None
        text, lengths = both_texts(self.negative["text"], condition["text"])
        pooled = condition["pooled"]
        pooled = torch.cat([self.negative["pooled"].expand_as(pooled), pooled])
        without, with_text = self._predict(
            torch.cat([x, x]), t=torch.cat([t, t]), text=text, pooled=pooled, lengths=lengths
        ).chunk(2)
        return without + self.cfg * (with_text - without)

    def _predict(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """One forward of the network.

        text: [B, L, D];  lengths: of both branches' texts where one is padded
        """
        self.attention.lengths = lengths
        # the text refiner's
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        for rows, length in zip(mask.chunk(2), lengths, strict=False):
            rows[:, length:] = False
        guidance = None
        if self.network.config.guidance_embeds:  # type: ignore[union-attr]
            guidance = torch.full_like(t, self.guidance, dtype=self.guidance_dtype) * 1000.0
            guidance = guidance.to(t.dtype)
        (v,) = self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * diffusers_folder.TRAIN_TIMESTEPS,
            encoder_hidden_states=text.to(self.dtype),
            encoder_attention_mask=mask,
            pooled_projections=pooled.to(self.dtype),
            guidance=guidance,
            return_dict=False,
        )
        return v.float()

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F, H, W] float32 to the VAE's frames [B, 3, F, H, W], about -1 to 1."""
        vae: Any = self.vae
        (vae.enable_tiling if max(x.shape[-2:]) > TILED_ABOVE else vae.disable_tiling)()
        frames: Tensor = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample
        return frames

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, F, H, W] float32 to pixels, uint8 [B, F, H, W, 3]."""
        return diffusers_folder.decode(self.frames, x, condition, self.decode_batch or len(x))


def both_texts(negative: Tensor, text: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The two branches' texts as one batch, the shorter padded, and their lengths where that was
    needed.

    negative: [L, D];  text: [B, M, D];  returns [2 B, max(L, M), D], and (L, M) or nothing
    """
    lengths = (len(negative), text.shape[1])
    padded = pad(negative, (0, 0, 0, max(lengths) - len(negative))).expand(len(text), -1, -1)
    both = torch.cat([padded, pad(text, (0, 0, 0, max(lengths) - text.shape[1]))])
    return both, lengths if lengths[0] != lengths[1] else ()


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoders of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    with diffusers_folder.freed(text_encoder(where, settings.torch_dtype, device)) as texts:
        yield texts


def text_encoder(where: Path, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """The text encoders of a folder, with this family's limits."""
    return TextEncoder(where, dtype, device, (MAX_TEXT_TOKENS, MAX_CLIP_TOKENS))


def blocks(network: nn.Module) -> list[nn.Module]:
    """The dual-stream blocks, then the single-stream ones."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> HunyuanVideo:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    shift = diffusers_folder.constant_shift(where)
    check_network(settings, where, images=False)
    network, vae = load_networks(settings, where, device)
    guidance = USUAL_GUIDANCE if settings.guidance is None else settings.guidance
    return HunyuanVideo(network, vae=vae, shift=shift, settings=settings, guidance=guidance)


def check_network(settings: Model, where: Path, images: bool) -> dict[str, Any]:
    """The network's config, read before its weights, which are large.

    images: whether it must take a reference image

    Raises UserError where it is the other kind of network, does not fit the VAE, or has no place
    for model.guidance.
    """
    config = diffusers_folder.read_json(
        diffusers_folder.network_folder(settings, NETWORK) / "config.json"
    )
    named = diffusers_folder.named_network(settings)
    taken, given = config.get("in_channels"), config.get("out_channels")
    if config.get("image_condition_type") is not None:
        kind = config["image_condition_type"]
        raise UserError(
            f"{named}: a HunyuanVideo I2V network ({kind}), which no family trains; use "
            "SkyReels-V1's."
        )
    if not isinstance(taken, int) or not isinstance(given, int) or taken not in (given, 2 * given):
        raise UserError(
            f"{named}: its config.json has in_channels={taken} and out_channels={given}; correct "
            "the path."
        )
    if (taken == 2 * given) != images:
        kind, other = ("text", "hunyuan_video") if images else ("image", "skyreels_i2v")
        raise UserError(
            f"{named}: a network of {kind}-to-video ({taken} channels in, {given} out); set "
            f"model.family={other}, or "
            "correct the path."
        )
    patch, patch_t = config.get("patch_size"), config.get("patch_size_t", 1)
    if not isinstance(patch, int) or patch_t != 1:
        raise UserError(
            f"{named}: its config.json has patch_size={patch} and patch_size_t={patch_t}, not a "
            "whole number and 1; "
            "use a network of HunyuanVideo."
        )
    latent = diffusers_folder.read_json(where / "vae" / "config.json").get("latent_channels")
    if latent != given:
        raise UserError(
            f"{named}: the network makes {given} channels and the VAE takes {latent}; of different "
            "models."
        )
    if settings.guidance is not None and not config.get("guidance_embeds", True):
        raise UserError(
            f"model.guidance={settings.guidance}: this network has no embedded guidance; set "
            "model.cfg instead."
        )
    return config


def load_networks(settings: Model, where: Path, device: torch.device) -> tuple[Any, Any]:
    """The transformer, without weights yet, and the VAE, in the compute precision and frozen."""
    place = diffusers_folder.network_folder(settings, NETWORK)
    network = streaming.outline(HunyuanVideoTransformer3DModel, place, device)
    vae = diffusers_folder.read(AutoencoderKLHunyuanVideo, where / "vae", settings.torch_dtype)
    return network, vae.requires_grad_(False).eval().to(device)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return FamilyPlan(
        network=_sizes(config),
        patch=config["patch_size"],
        auxiliary=AUXILIARY,
        text_width=config["text_embed_dim"],
        pooled_width=config["pooled_projection_dim"],
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """HunyuanVideoTransformer3DModel of a config, written down."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, patch = heads * head, config["patch_size"]
    kernel = (config.get("patch_size_t", 1), patch, patch)
    rest = Unit("")
    rest.conv("x_embedder.proj", config["in_channels"], width, kernel)
    token_refiner(rest, "context_embedder", config, width)
    rest.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    rest.embedder("time_text_embed.text_embedder", config["pooled_projection_dim"], width)
    if config.get("guidance_embeds", True):
        rest.embedder("time_text_embed.guidance_embedder", TIME_CHANNELS, width)
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, math.prod(kernel) * config["out_channels"], VIDEO)
    repeated = joint_blocks(config, int(width * config["mlp_ratio"]), DUAL_KEPT, SINGLE_KEPT)
    return Network(blocks=repeated, rest=rest, width=width, heads=heads, rotary=head)


def simulated(config: Mapping[str, Any], settings: Model) -> HunyuanVideo:
    """The policy around a network of this config, without a VAE: all that a simulated rank runs."""
    network = HunyuanVideoTransformer3DModel(**config).train()
    return HunyuanVideo(network, vae=nn.Module(), shift=1.0, settings=settings, guidance=1.0)
