"""FLUX.1-dev and FLUX.1-schnell, text-to-image (Black Forest Labs 2024).

diffusers' unmodified classes, and the embedded guidance of the distilled dev checkpoint (schnell
has none). Outside, latents are those of the VAE, [B, C, 1, H, W]; the network sees patches of 2 x 2
as tokens. Its times are the folder's scheduler's: shifted by the number of tokens (dev) or by a
constant (schnell), or by rollout.shift. The T5 features of all token places are text to it, padding
included, without a mask.

The network takes t in [0, 1] and the plain guidance scale, and multiplies both by 1000 in the
compute precision: with bfloat16 the time is rounded to 8 bits, in diffusers' pipeline as here, and
in rollout and update alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from einops import rearrange
from torch import Tensor, nn

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models.attention import joint
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import CLIP_L, T5_XXL
from fastgrpo.models.sizes.transformer_blocks import TIME_CHANNELS, Kept, joint_blocks
from fastgrpo.models.sizes.units import SAMPLE, TEXT, VIDEO, Network, Unit
from fastgrpo.models.text_encoders.t5_and_clip import TextEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2")
PIPELINES = ("FluxPipeline",)  # whose folders this family reads
USUAL_GUIDANCE = 3.5
PATCH = (
    2  # latent places per token and side; fixed by the pipeline, the network's own patch_size is 1
)
MAX_TEXT_TOKENS = (
    512  # T5's, where the tokenizer does not say fewer; diffusers' pipeline accepts no more
)
DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
PUBLISHED = (("schnell", DEV | {"guidance_embeds": False}), ("", DEV))
"""Parts of a hub id, in lower case, and the network's config; a plan takes the first that fits."""
DUAL_KEPT = {  # bytes per token and channel, by the bytes of a number
    2: Kept((23.0, 28.0), (56.1, 56.1), (66.1, 58.0), 2.0, moved=(258.3, 248.3)),
    4: Kept((48.0, 40.0), (112.1, 112.1), (132.1, 116.0), 4.0),
}
SINGLE_KEPT = {
    2: Kept((32.0, 32.0), (52.1, 52.1), (66.1, 66.1), moved=(238.3, 238.3)),
    4: Kept((56.0, 56.0), (104.1, 104.1), (132.1, 132.1)),
}
AUXILIARY = AuxiliaryModels(
    space=8,
    time=1,
    channels=16,
    text=MAX_TEXT_TOKENS,
    encoders=4.89e9,
    texts=(
        CLIP_L.read_as("text_encoder", texts=32, longest=77),
        T5_XXL.read_as("text_encoder_2", texts=32, longest=MAX_TEXT_TOKENS),
    ),
    vae=0.0838e9,
    decode_flops=9.7e6,
    decode_bytes=1537,
    graph_bytes=11633,
)
# latent height or width (2048 pixels) from which the VAE decodes in tiles, to bound its memory
TILED_ABOVE = 256


class Schedule:
    """The times of the folder's scheduler."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        diffusers_folder.check_flow_scheduler(config)
        self.config = dict(config)

    def grid(self, steps: int, shift: float | None, tokens: int) -> Tensor:
        """Times of diffusers' pipeline.

        shift: a constant, in place of the folder's;  returns float32 [steps + 1]
        """
        own = {} if shift is None else {"use_dynamic_shifting": False, "shift": shift}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.config | own)
        mu = self.mu(steps, tokens, scheduler.config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        times: Tensor = scheduler.sigmas
        return times

    def mu(self, steps: int, tokens: int, known: Any) -> float:
        """The logarithm of the shift of a scheduler that shifts dynamically.  known: its config"""
        shift: float = calculate_shift(
            tokens,
            known.base_image_seq_len,
            known.max_image_seq_len,
            known.base_shift,
            known.max_shift,
        )
        return shift


class SharedAttention:
    """Joint attention over ranks, text tokens first; single-stream blocks have them in one
    sequence.
    """

    def __init__(self, layout: Layout, plain: Any) -> None:
        self.layout = layout
        self.plain = plain  # the processor of one rank, which knows the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This rank's image tokens [B, n, C] and the replicated text [B, L, C], after attention.

        hidden_states: [B, n, C], or of a single-stream block both, [B, L + n, C]
        encoder_hidden_states: [B, L, C], or None of a single-stream block
        image_rotary_emb: cosines and sines of text and this rank's tokens, [L + n, D] each
        returns likewise
        """
        q, k, v = joint.heads(attn, hidden_states)
        if encoder_hidden_states is not None:
            about_text = joint.heads(attn, encoder_hidden_states, joint.TEXT_LAYERS)
            q, k, v = (torch.cat(pair, 1) for pair in zip(about_text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = (joint.rotated(x, image_rotary_emb) for x in (q, k))
        length = self.layout.text
        out = self.layout.attend(
            q, k=k, v=v, text=slice(0, length), backend=self.plain._attention_backend
        )
        out = out.flatten(2).to(q.dtype)  # [B, L + n, C]
        if encoder_hidden_states is None:
            return out
        image, text = out[:, length:].contiguous(), out[:, :length].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""

    def note_text(text: Tensor) -> None:
        """text: [B, L, C]"""
        layout.text = text.shape[1]

    def split_table(table: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """[L + N, D] each to [L + n, D]"""
        part = layout.sp.part(len(table[0]) - layout.text)
        start, stop = layout.text + part.start, layout.text + part.stop
        return tuple(torch.cat([of[: layout.text], of[start:stop]]) for of in table)

    layout.after(network.context_embedder, note_text)  # runs before the rotary tables are made
    layout.after(network.pos_embed, split_table)
    layout.after(network.x_embedder, layout.split_tokens)
    layout.after(network.proj_out, layout.gather_tokens)
    for block in blocks(network):
        layout.process(block.attn, SharedAttention)


class Flux:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(
        self, network: nn.Module, vae: nn.Module, schedule: Schedule, settings: Model
    ) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.schedule = schedule
        self.negative: Condition | None = None
        self.guidance = USUAL_GUIDANCE if settings.guidance is None else settings.guidance
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        diffusers_folder.image_only(video, "FLUX")
        config: Any = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, *diffusers_folder.latent_size(video, factor, 1, PATCH)

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        _, _, height, width = shape
        return self.schedule.grid(steps, shift, (height // PATCH) * (width // PATCH))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        text = condition["text"].to(self.dtype)
        guidance = None
        if self.network.config.guidance_embeds:  # type: ignore[union-attr]
            guidance = torch.full_like(t, self.guidance)
        (v,) = self.network(
            hidden_states=pack(x).to(self.dtype),
            encoder_hidden_states=text,
            pooled_projections=condition["pooled"].to(self.dtype),
            timestep=t,
            img_ids=positions(height, width, x.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            guidance=guidance,
            return_dict=False,
        )
        return unpack(v.float(), height, width)

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F, H, W] float32 to the VAE's frames [B, 3, F, H, W], about -1 to 1."""
        return frames_of(self.vae, x)

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, F, H, W] float32 to pixels, uint8 [B, F, H, W, 3]."""
        at_once = self.decode_batch or diffusers_folder.images_at_once(self.vae, x)
        return diffusers_folder.decode(self.frames, x, condition, at_once)


def frames_of(vae: Any, x: Tensor) -> Tensor:
    """Latents [B, C, 1, H, W] to the frames [B, 3, 1, H, W] of an AutoencoderKL with a shift."""
    vae.use_tiling = max(x.shape[-2:]) > TILED_ABOVE
    latents = (x / vae.config.scaling_factor + vae.config.shift_factor).squeeze(2).to(vae.dtype)
    frames: Tensor = vae.decode(latents).sample.unsqueeze(2)
    return frames


def pack(x: Tensor) -> Tensor:
    """Latents [B, C, 1, H, W] to tokens [B, H/2 * W/2, 4 C], row by row."""
    return rearrange(x, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: tokens [B, H/2 * W/2, 4 C] to [B, C, 1, H, W].

    height, width: in tokens
    """
    return rearrange(
        tokens, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH
    )


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """The tokens' places for the rotary tables: 0, row, column.

    returns float32 [height * width, 3]
    """
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], -1)


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoders of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    texts = TextEncoder(where, settings.torch_dtype, device, MAX_TEXT_TOKENS)
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The dual-stream blocks, then the single-stream ones."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> Flux:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    if settings.cfg != 1:
        raise UserError(
            f"model.cfg={settings.cfg}: FLUX is guided by what it was distilled with, not by a "
            "second branch; leave it "
            "out and set model.guidance."
        )
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    schedule = Schedule(diffusers_folder.scheduler_config(where))
    vae = diffusers_folder.read(AutoencoderKL, where / "vae", settings.torch_dtype)
    network = diffusers_folder.network_folder(settings, NETWORK)
    check_network(diffusers_folder.read_json(network / "config.json"), where, vae.config, settings)
    network = streaming.outline(FluxTransformer2DModel, network, device)
    return Flux(network, vae.requires_grad_(False).eval().to(device), schedule, settings)


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    if vae.get("shift_factor") is None:
        raise UserError(
            f"{named}: vae/config.json has no shift_factor, which FLUX's has; correct model.family."
        )
    taken, given = config.get("in_channels"), config.get("out_channels")
    if (
        taken != vae.latent_channels * PATCH**2
        or given not in (None, taken)
        or config.get("patch_size", 1) != 1
    ):
        raise UserError(
            f"{named}: the network has {taken} channels in and {taken if given is None else given} "
            "out, and the VAE's "
            f"{vae.latent_channels} make {vae.latent_channels * PATCH**2}; use a text-to-image "
            "FLUX.1, not "
            "Fill, Canny, Depth or FLUX.2."
        )
    widths = [config.get(key) for key in ("joint_attention_dim", "pooled_projection_dim")]
    made = [
        diffusers_folder.read_json(where / part / "config.json")
        for part in ("text_encoder_2", "text_encoder")
    ]
    if widths != [made[0].get("d_model"), made[1].get("hidden_size")]:
        raise UserError(
            f"{named}: the network takes text of widths {widths[0]} and {widths[1]}, the text "
            "encoders make "
            f"{made[0].get('d_model')} and {made[1].get('hidden_size')}; the parts are of "
            "different models."
        )
    if settings.guidance is not None and not config.get("guidance_embeds", False):
        raise UserError(
            f"model.guidance={settings.guidance}: this network (FLUX.1-schnell's kind) has no "
            "guidance; leave it out."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return FamilyPlan(
        network=_sizes(config),
        patch=PATCH,
        auxiliary=AUXILIARY,
        text_width=config["joint_attention_dim"],
        pooled_width=config["pooled_projection_dim"],
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """FluxTransformer2DModel of a config, written down."""
    heads, head, taken = (
        config["num_attention_heads"],
        config["attention_head_dim"],
        config["in_channels"],
    )
    width = heads * head
    rest = Unit("")
    rest.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    if config.get("guidance_embeds", False):
        rest.embedder("time_text_embed.guidance_embedder", TIME_CHANNELS, width)
    rest.embedder("time_text_embed.text_embedder", config["pooled_projection_dim"], width)
    rest.linear("context_embedder", config["joint_attention_dim"], width, TEXT)
    rest.linear("x_embedder", taken, width, VIDEO)
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, config.get("out_channels") or taken, VIDEO)
    repeated = joint_blocks(config, 4 * width, DUAL_KEPT, SINGLE_KEPT)
    return Network(blocks=repeated, rest=rest, width=width, heads=heads, rotary=head)


def simulated(config: Mapping[str, Any], settings: Model) -> Flux:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    schedule: Any = None
    return Flux(FluxTransformer2DModel(**config).train(), nn.Module(), schedule, settings)
