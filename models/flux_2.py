"""FLUX.2 klein, text-to-image (Black Forest Labs 2026): base with classifier-free guidance, and
distilled without.

diffusers' unmodified classes. Outside, latents are those of the VAE but normalised: [B, C, 1, H, W]
with the mean and the variance of each of a 2 x 2 patch's 4 C channels, which lie in the VAE's
weights as a batch normalisation's running ones; no scaling factor. Tokens are FLUX.1's. How far
times are shifted follows from the numbers of tokens and of steps, by a formula of the authors'.

Text is three states of Qwen3, of all 512 places, padding included, without a mask. The
single-stream blocks have one layer into attention and feed-forward and one out of both, which
adapters reach by lora.targets "to_qkv_mlp_proj" and "attn.to_out" alone.

The network multiplies t by 1000 in the compute precision: with bfloat16 the time is rounded to 8
bits, in diffusers' pipeline as here, and in rollout and update alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo import models
from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models import flux
from fastgrpo.models.attention import fused
from fastgrpo.models.flux import pack, unpack
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import QWEN_3_4B, QWEN_3_8B
from fastgrpo.models.sizes.transformer_blocks import TIME_CHANNELS, JointBlock, Kept
from fastgrpo.models.sizes.units import (
    ATTENDING,
    ATTENDING_TEXT,
    BOTH,
    SAMPLE,
    TEXT,
    VIDEO,
    Attention,
    Block,
    Network,
    Unit,
)
from fastgrpo.models.text_encoders.qwen_3 import LAYERS, PaddedEncoder
from fastgrpo.parallel.precision import to_compute_precision
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "scheduler", "tokenizer")
PIPELINES = ("Flux2KleinPipeline",)  # whose folders this family reads
PATCH: int = models.declared("flux", "PATCH")
MAX_TEXT_TOKENS = 512  # of a prompt's chat; all texts are padded to as many
TEXT_LAYERS = 28  # of the text encoder's 36: those that the states need, and one
KLEIN_4B: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": TIME_CHANNELS,
    "mlp_ratio": 3.0,
    "guidance_embeds": False,
}
KLEIN_9B = KLEIN_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
PUBLISHED = (("9b", KLEIN_9B), ("", KLEIN_4B))
"""Parts of a hub id, in lower case, and the network's config; a plan takes the first that fits."""
DUAL_KEPT = {  # bytes per token and channel, by the bytes of a number
    2: Kept((32.0, 14.0), (64.1, 64.1), (76.1, 57.1), 2.0, moved=(272.3, 262.3)),
    4: Kept((64.0, 8.0), (128.1, 128.1), (152.1, 114.1), 4.0),
}
SINGLE_KEPT = {
    2: Kept((40.0, 40.0), (62.1, 62.1), (92.1, 92.1), 2.0, moved=(244.3, 244.3)),
    4: Kept((80.0, 80.0), (116.1, 116.1), (176.1, 176.1), 4.0),
}
AUXILIARY = AuxiliaryModels(
    space=8,
    time=1,
    channels=32,
    text=MAX_TEXT_TOKENS,
    encoders=4.02e9,
    texts=(
        replace(QWEN_3_4B, blocks=TEXT_LAYERS).read_as(
            "text_encoder", texts=8, longest=MAX_TEXT_TOKENS, states=True
        ),
    ),
    vae=0.084e9,
    decode_flops=9.6e6,
    decode_bytes=1545,
    graph_bytes=11634,
)
AUXILIARY_9B = replace(
    AUXILIARY,
    encoders=8.19e9,
    texts=(
        replace(QWEN_3_8B, blocks=TEXT_LAYERS).read_as(
            "text_encoder", texts=8, longest=MAX_TEXT_TOKENS, states=True
        ),
    ),
)


class Schedule(flux.Schedule):
    """The times of the folder's scheduler, shifted by tokens and steps."""

    def mu(self, steps: int, tokens: int, known: Any) -> float:
        """The logarithm of the shift: another one above 4,300 tokens, where steps do not count."""
        return float(compute_empirical_mu(tokens, steps))


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""
    of_image = False  # whether the next rotary table is the image's; the text's follows it

    def split_tokens(x: Tensor) -> Tensor:
        """[B, N, C] to [B, n, C]"""
        nonlocal of_image
        of_image = True
        return layout.split_tokens(x)

    def note_text(text: Tensor) -> None:
        """text: [B, L, C]"""
        layout.text = text.shape[1]

    def split_table(table: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The image's [N, D] each to [n, D]; the text's [L, D] as they are."""
        nonlocal of_image
        if not of_image:
            return table
        of_image = False
        part = layout.sp.part(len(table[0]))
        return tuple(of[part.start : part.stop] for of in table)

    layout.after(network.x_embedder, split_tokens)
    layout.after(network.context_embedder, note_text)
    layout.after(network.pos_embed, split_table)
    layout.after(network.proj_out, layout.gather_tokens)
    for block in network.transformer_blocks:
        layout.process(block.attn, flux.SharedAttention)
    for block in network.single_transformer_blocks:
        layout.process(block.attn, fused.SharedAttention)


class Flux2:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(
        self, network: nn.Module, vae: nn.Module, schedule: Schedule, settings: Model
    ) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.latent_mean, self.latent_std = latent_statistics(vae)
        self.schedule = schedule
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        diffusers_folder.image_only(video, "FLUX.2 klein")
        config: Any = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, *diffusers_folder.latent_size(video, factor, 1, PATCH)

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        _, _, height, width = shape
        return self.schedule.grid(steps, shift, (height // PATCH) * (width // PATCH))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, 1, H, W] float32;  t: [B];  returns like x
        """
        text = condition["text"]
        if self.cfg == 1:
            return self._predict(x, t, text)
        assert self.negative is not None
        both = torch.cat([self.negative["text"].expand_as(text), text])
        without, with_text = self._predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + self.cfg * (with_text - without)

    def _predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """One forward of the network.  x: [B, C, 1, H, W];  text: [B, L, D];  returns like x"""
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        (v,) = self.network(
            hidden_states=pack(x).to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            timestep=t,
            img_ids=pad(flux.positions(height, width, x.device), (0, 1)),
            txt_ids=pad(torch.arange(text.shape[1], device=x.device)[:, None], (3, 0)),
            guidance=None,
            return_dict=False,
        )
        return unpack(v.float(), height, width)

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, 1, H, W] float32 to the VAE's frames [B, 3, 1, H, W], about -1 to 1."""
        vae: Any = self.vae
        vae.use_tiling = max(x.shape[-2:]) > flux.TILED_ABOVE
        tokens = pack(x) * self.latent_std + self.latent_mean  # [B, N, 4 C]
        latents = unpack(tokens, x.shape[-2] // PATCH, x.shape[-1] // PATCH).squeeze(2)
        frames: Tensor = vae.decode(latents.to(vae.dtype)).sample
        return frames.unsqueeze(2)

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, 1, H, W] float32 to pixels, uint8 [B, 1, H, W, 3]."""
        at_once = self.decode_batch or diffusers_folder.images_at_once(self.vae, x)
        return diffusers_folder.decode(self.frames, x, condition, at_once)


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a patch's channels, float32 [4 C] each."""
    return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[PaddedEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    texts = PaddedEncoder(where, settings.torch_dtype, device, MAX_TEXT_TOKENS)
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The dual-stream blocks, then the single-stream ones."""
    return flux.blocks(network)


def load(settings: Model, device: torch.device) -> Flux2:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    diffusers_folder.refuse_guidance(settings, "FLUX.2 klein")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    distilled = diffusers_folder.read_json(where / "model_index.json").get("is_distilled")
    if distilled and settings.cfg != 1:
        raise UserError(
            f"model.cfg={settings.cfg}: model_index.json has is_distilled=true, and a distilled "
            "FLUX.2 klein has no second branch; leave it out, or use a base one."
        )
    schedule = Schedule(diffusers_folder.scheduler_config(where))
    vae = diffusers_folder.read(AutoencoderKLFlux2, where / "vae", torch.float32)
    network = diffusers_folder.network_folder(settings, NETWORK)
    check_network(diffusers_folder.read_json(network / "config.json"), where, vae.config, settings)
    network = streaming.outline(Flux2Transformer2DModel, network, device)
    to_compute_precision(vae, settings.torch_dtype)  # but its statistics, which it would round
    return Flux2(network, vae.requires_grad_(False).eval().to(device), schedule, settings)


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    if config.get("guidance_embeds", True):
        raise UserError(
            f"{named}: the network's config has guidance_embeds=true, as FLUX.2-dev has; use "
            "FLUX.2 klein."
        )
    taken = config.get("in_channels")
    given = config.get("out_channels") or taken
    if not taken == given == vae.latent_channels * PATCH**2 or config.get("patch_size", 1) != 1:
        raise UserError(
            f"{named}: the network has {taken} channels in and {given} out, and the VAE's "
            f"{vae.latent_channels} make {vae.latent_channels * PATCH**2}; use FLUX.2 klein."
        )
    text = diffusers_folder.read_json(where / "text_encoder" / "config.json")
    made = len(LAYERS) * text.get("hidden_size", 0)
    if config.get("joint_attention_dim") != made:
        raise UserError(
            f"{named}: the network takes text of width {config.get('joint_attention_dim')}, the "
            f"text encoder makes {made}; the parts are of different models."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    text = config["joint_attention_dim"]
    return FamilyPlan(
        network=_sizes(config),
        patch=PATCH,
        auxiliary=AUXILIARY_9B if text == KLEIN_9B["joint_attention_dim"] else AUXILIARY,
        text_width=text,
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """Flux2Transformer2DModel of a config, written down; no layer has a bias."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, taken = heads * head, config["in_channels"]
    embedder = "time_guidance_embed.timestep_embedder"
    rest = Unit("")
    for name, inputs, outputs, where in (
        (
            f"{embedder}.linear_1",
            config.get("timestep_guidance_channels", TIME_CHANNELS),
            width,
            SAMPLE,
        ),
        (f"{embedder}.linear_2", width, width, SAMPLE),
        ("double_stream_modulation_img.linear", width, 6 * width, SAMPLE),
        ("double_stream_modulation_txt.linear", width, 6 * width, SAMPLE),
        ("single_stream_modulation.linear", width, 3 * width, SAMPLE),
        ("x_embedder", taken, width, VIDEO),
        ("context_embedder", config["joint_attention_dim"], width, TEXT),
        ("norm_out.linear", width, 2 * width, SAMPLE),
        ("proj_out", width, config.get("out_channels") or taken, VIDEO),
    ):
        rest.linear(name, inputs, outputs, where, bias=False)
    hidden = int(width * config.get("mlp_ratio", 3.0))
    dual = (_dual_block(n, heads, head, hidden) for n in range(config["num_layers"]))
    single = (_single_block(n, heads, head, hidden) for n in range(config["num_single_layers"]))
    repeated = (*dual, *single)
    return Network(blocks=repeated, rest=rest, width=width, heads=heads, rotary=head)


def _dual_block(number: int, heads: int, head: int, hidden: int) -> Block:
    """Separate weights for image and text, joint attention, gated feed-forward layers."""
    unit, width = JointBlock(f"transformer_blocks.{number}", kept=DUAL_KEPT), heads * head
    for name, attending, where in (("ff", ATTENDING, VIDEO), ("ff_context", ATTENDING_TEXT, TEXT)):
        for layer in attending:
            unit.linear(f"attn.{layer}", width, width, where, bias=False)
        unit.linear(f"{name}.linear_in", width, 2 * hidden, where, bias=False)
        unit.linear(f"{name}.linear_out", hidden, width, where, bias=False)
    for layer in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width=width, queries=BOTH, keys=BOTH))
    return unit


def _single_block(number: int, heads: int, head: int, hidden: int) -> Block:
    """One sequence of both, one layer into attention and feed-forward and one out of both."""
    unit, width = JointBlock(f"single_transformer_blocks.{number}", kept=SINGLE_KEPT), heads * head
    unit.linear("attn.to_qkv_mlp_proj", width, 3 * width + 2 * hidden, BOTH, bias=False)
    unit.linear("attn.to_out", width + hidden, width, BOTH, bias=False)
    for layer in ("norm_q", "norm_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width=width, queries=BOTH, keys=BOTH))
    return unit


def simulated(config: Mapping[str, Any], settings: Model) -> Flux2:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    schedule: Any = None
    vae: Any = nn.Module()  # in place of one: what is asked of it
    vae.bn, vae.config = nn.BatchNorm2d(config["in_channels"]), SimpleNamespace(batch_norm_eps=1e-4)
    network = Flux2Transformer2DModel(**config).train()
    return Flux2(network, vae, schedule, settings)
