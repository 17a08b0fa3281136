"""HunyuanVideo-1.5, text-to-video (Tencent Hunyuan 2025, arXiv 2511.18870).

diffusers' modules, unmodified, and a forward of our own in place of their class's. That one makes
room for the longest texts and an image, sorts each sample's tokens behind those that count, which
waits for masks' values on the device, and masks the rest in every block, which rules flash
attention out. Here each text has its own length from the start: what is attended to is the same.

Text is Qwen2.5-VL's states, and ByT5's of what the prompt quotes, which a clip shows as letters.
Classifier-free guidance runs both branches as one batch; where their texts differ in length, each
attends to its own. How it combines them is read from the folder's guider. Times stay float32 with
weights in bfloat16, where the pipeline rounds 987.3 to 988.

The decoder attends to all places of a clip at once, so it always decodes in tiles of 256 x 256
pixels; a tile has all frames.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo import models
from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models.attention.trimmed import SharedAttention, TrimmedAttention
from fastgrpo.models.loading import diffusers_folder, guider, streaming
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import BYT5_SMALL, QWEN_2_5_VL_7B
from fastgrpo.models.sizes.transformer_blocks import (
    TIME_CHANNELS,
    dual_block,
    token_refiner,
)
from fastgrpo.models.sizes.units import IMAGE, SAMPLE, TEXT, VIDEO, Network, Unit
from fastgrpo.models.text_encoders.qwen_and_byt5 import TextEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = (
    "vae",
    "text_encoder",
    "text_encoder_2",
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "guider",
)
PIPELINES = ("HunyuanVideo15Pipeline",)  # whose folders this family reads
MAX_TEXT_TOKENS = 1000  # of a prompt and of the chat behind it
MAX_GLYPH_TOKENS = 256
GLYPH_HIDDEN = 2048  # channels inside the projection of ByT5's states
REAL: dict[str, Any] = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "rope_axes_dim": (16, 56, 56),
}
PUBLISHED = (("", REAL),)
KEPT = models.declared("hunyuan_video", "DUAL_KEPT")
AUXILIARY = AuxiliaryModels(
    space=16,
    time=4,
    channels=32,
    text=MAX_TEXT_TOKENS,
    trimmed=True,
    encoders=7.29e9,
    texts=(
        BYT5_SMALL.read_as("text_encoder_2", texts=1, longest=MAX_GLYPH_TOKENS),
        QWEN_2_5_VL_7B.read_as(
            "text_encoder", texts=16, longest=108 + MAX_TEXT_TOKENS, around=113, states=True
        ),
    ),
    vae=1.2606e9,
    decode_flops=25.1e6,
    decode_bytes=1796,
    graph_bytes=16172,
    tile=(1 << 20, 256, 256),
    stride=(1 << 20, 192, 192),
)
SEEN = ("image", "image_states")
"""What a condition has of a reference image, the same in both branches of guidance."""
UNSEEN = ("attn.to_add_out.", "ff_context.")
"""Parts of the last block whose text no prediction depends on: they are not trained."""


class HunyuanVideo15Transformer3DModel(diffusers.HunyuanVideo15Transformer3DModel):  # type: ignore[misc]
    """diffusers' network with tokens of texts' own lengths in place of masks.

    Of the same name, which configs and messages say.
    """

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, texts: Sequence[Condition]
    ) -> Tensor:
        """The velocity [B, C, F, H, W].

        hidden_states: [B, 2 C + 1, F, H, W], the noisy latent, a condition's and its mask
        timestep: [B] float32, 0 to 1000
        texts: of each part of the batch, one after the other, "text" [b, L, D], "glyphs" [b, G, E],
            and, of a reference image, "image_states" [b, I, K]
        """
        table = self.rope(hidden_states)
        time_embed = self.time_embed  # its own forward casts to the time's precision
        sinusoids = time_embed.time_proj(timestep).to(hidden_states.dtype)
        temb = time_embed.timestep_embedder(sinusoids)
        video = self.x_embedder(hidden_states)  # [B, N, D]
        parts = timestep.split([len(part["text"]) for part in texts])
        tokens = [self._tokens(part, t) for part, t in zip(texts, parts, strict=True)]
        longest = max(part.shape[1] for part in tokens)
        text = torch.cat([pad(part, (0, 0, 0, longest - part.shape[1])) for part in tokens])
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.transformer_blocks:
            run = (self._gradient_checkpointing_func, block) if recompute else (block,)
            video, text = run[0](*run[1:], video, text, temb, None, table)
        v = self.proj_out(self.norm_out(video, temb))  # [B, N, C], patches of one place
        return v.transpose(1, 2).unflatten(2, hidden_states.shape[2:]).contiguous()

    def _tokens(self, part: Condition, t: Tensor) -> Tensor:
        """Tokens [b, I + G + L, D] of image and text that the blocks see.  t: [b]"""
        kinds = self.cond_type_embed(torch.arange(3, device=t.device))
        own = self.context_embedder(part["text"], t, None) + kinds[0]
        tokens = [self.context_embedder_2(part["glyphs"]) + kinds[1], own]
        if "image_states" in part:
            tokens.insert(0, self.image_embedder(part["image_states"]) + kinds[2])
        return torch.cat(tokens, 1)


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


class HunyuanVideo15:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence
    sees_image: ClassVar[bool] = False  # whether a reference image's states are among the tokens

    def __init__(
        self, network: nn.Module, vae: Any, shift: float, rescale: float, settings: Model
    ) -> None:
        self.network = network
        network.image_embedder.requires_grad_(self.sees_image)
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.shift = shift
        self.rescale = rescale
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch
        self.attention = TrimmedAttention()
        for block in self.blocks:
            block.attn.set_processor(self.attention)  # type: ignore[operator, union-attr]
        for name, parameter in self.blocks[-1].named_parameters():
            if name.startswith(UNSEEN):
                parameter.requires_grad_(False)

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        config: Any = self.vae.config
        space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
        return config.latent_channels, *diffusers_folder.latent_size(video, space, time, 1)

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        return transitions.time_grid(steps, shift or self.shift)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        if self.cfg == 1:
            return self._predict(x, t, [condition])
        assert self.negative is not None
        negative = {name: of.expand(len(x), *of.shape) for name, of in self.negative.items()}
        negative |= {name: condition[name] for name in SEEN if name in condition}
        without, with_text = self._predict(
            torch.cat([x, x]), torch.cat([t, t]), [negative, condition]
        ).chunk(2)
        return guider.guided(without, with_text, self.cfg, self.rescale)

    def _predict(self, x: Tensor, t: Tensor, texts: Sequence[Condition]) -> Tensor:
        """One forward of the network.  x: [B, C, F, H, W];  texts: as the network's"""
        tokens = [
            {name: of.to(self.dtype) for name, of in part.items() if name != "image"}
            for part in texts
        ]
        lengths = tuple(sum(of.shape[1] for of in part.values()) for part in tokens)
        self.attention.lengths = lengths if len(set(lengths)) > 1 else ()
        v: Tensor = self.network(
            hidden_states=self._given(x, texts).to(self.dtype),
            timestep=t * diffusers_folder.TRAIN_TIMESTEPS,
            texts=tokens,
        )
        return v.float()

    def _given(self, x: Tensor, texts: Sequence[Condition]) -> Tensor:
        """The noisy latent, and behind it a condition's latent and its mask: here none.

        x: [B, C, F, H, W];  texts: as the network's;  returns [B, 2 C + 1, F, H, W]
        """
        return pad(x, (0, 0, 0, 0, 0, 0, 0, x.shape[1] + 1))

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F, H, W] float32 to the VAE's frames [B, 3, F, H, W], about -1 to 1."""
        self.vae.enable_tiling()
        self.vae.enable_slicing()  # its masks are made for one clip
        frames: Tensor = self.vae.decode(
            x.to(self.vae.dtype) / self.vae.config.scaling_factor
        ).sample
        return frames

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, F, H, W] float32 to pixels, uint8 [B, F, H, W, 3]."""
        return diffusers_folder.decode(self.frames, x, condition, self.decode_batch or len(x))


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoders of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    longest = (MAX_TEXT_TOKENS, MAX_GLYPH_TOKENS)
    texts = TextEncoder(where, settings.torch_dtype, device, longest)
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's blocks."""
    return [*network.transformer_blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> HunyuanVideo15:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    return load_as(HunyuanVideo15, settings, device, PARTS)


P = TypeVar("P", bound=HunyuanVideo15)


def load_as(kind: type[P], settings: Model, device: torch.device, parts: Sequence[str]) -> P:
    """The policy of this kind.  parts: of the pipeline's folder"""
    diffusers_folder.refuse_guidance(settings, "HunyuanVideo-1.5")
    where = diffusers_folder.pipeline_folder(settings, parts)
    shift = diffusers_folder.constant_shift(where)
    rescale = guider.read_rescale(where, settings.cfg)
    place = diffusers_folder.network_folder(settings, NETWORK)
    vae = diffusers_folder.read(AutoencoderKLHunyuanVideo15, where / "vae", settings.torch_dtype)
    check_network(diffusers_folder.read_json(place / "config.json"), where, vae.config, settings)
    network = streaming.outline(HunyuanVideo15Transformer3DModel, place, device)
    vae = vae.requires_grad_(False).eval().to(device)
    return kind(network, vae, shift=shift, rescale=rescale, settings=settings)


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    if config.get("use_meanflow"):
        raise UserError(
            f"{named}: the network's config has use_meanflow=true, as models of super-resolution "
            "have; use a text-to-video HunyuanVideo-1.5."
        )
    taken, given = config.get("in_channels"), config.get("out_channels")
    patches = (config.get("patch_size", 1), config.get("patch_size_t", 1))
    if given != vae.latent_channels or taken != 2 * given + 1 or patches != (1, 1):
        raise UserError(
            f"{named}: the network has {taken} channels in and {given} out in patches of "
            f"{patches[0]}, and the VAE's {vae.latent_channels} make {2 * vae.latent_channels + 1} "
            f"and {vae.latent_channels} in patches of 1; use a text-to-video HunyuanVideo-1.5."
        )
    wanted = tuple(config.get(key) for key in ("text_embed_dim", "text_embed_2_dim"))
    qwen, byt5 = (
        diffusers_folder.read_json(where / part / "config.json")
        for part in ("text_encoder", "text_encoder_2")
    )
    made = (qwen.get("text_config", qwen).get("hidden_size"), byt5.get("d_model"))
    if wanted != made:
        raise UserError(
            f"{named}: the network takes text of widths {wanted[0]} and {wanted[1]}, the text "
            f"encoders make {made[0]} and {made[1]}; the parts are of different models."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return FamilyPlan(
        network=_sizes(config),
        patch=1,
        auxiliary=AUXILIARY,
        text_width=config["text_embed_dim"],
        glyph_width=config["text_embed_2_dim"],
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """HunyuanVideo15Transformer3DModel of a config, written down."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, image, glyphs = heads * head, config["image_embed_dim"], config["text_embed_2_dim"]
    rest = Unit("")
    rest.conv("x_embedder.proj", config["in_channels"], width, (1, 1, 1))
    rest.norm("image_embedder.norm_in", image, bias=True)
    rest.linear("image_embedder.linear_1", image, image, IMAGE)
    rest.linear("image_embedder.linear_2", image, width, IMAGE)
    rest.norm("image_embedder.norm_out", width, bias=True)
    token_refiner(rest, "context_embedder", config, width)
    rest.norm("context_embedder_2.norm", glyphs, bias=True)
    rest.linear("context_embedder_2.linear_1", glyphs, GLYPH_HIDDEN, TEXT)
    rest.linear("context_embedder_2.linear_2", GLYPH_HIDDEN, GLYPH_HIDDEN, TEXT)
    rest.linear("context_embedder_2.linear_3", GLYPH_HIDDEN, width, TEXT)
    rest.embedder("time_embed.timestep_embedder", TIME_CHANNELS, width)
    rest.weights["cond_type_embed.weight"] = (3, width)
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, config["out_channels"], VIDEO)
    hidden = int(width * config["mlp_ratio"])
    repeated = tuple(
        dual_block(f"transformer_blocks.{n}", heads, head, hidden, kept=KEPT)
        for n in range(config["num_layers"])
    )
    return Network(blocks=repeated, rest=rest, width=width, heads=heads, rotary=head)


def simulated(config: Mapping[str, Any], settings: Model) -> HunyuanVideo15:
    """The policy around a network of this config, without a VAE: all that a simulated rank runs."""
    network = HunyuanVideo15Transformer3DModel(**config).train()
    return HunyuanVideo15(network, nn.Module(), shift=1.0, rescale=0.0, settings=settings)
