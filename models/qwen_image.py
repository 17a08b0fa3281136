"""Qwen-Image and Qwen-Image-2512, text-to-image (Qwen Team 2025, arXiv 2508.02324).

diffusers' unmodified classes. Outside, latents are those of the VAE, which is Wan 2.1's; the
network sees patches of 2 x 2 as tokens, as FLUX does, and its times are shifted by their number and
stretched to end where the folder's scheduler says. Text is Qwen2.5-VL's states of the prompt's own
tokens: nothing is padded, and where guidance's two branches have texts of two lengths, each attends
to its own.

Classifier-free guidance keeps the length that each token's velocity has with the text: what the two
branches give together is scaled to it, token by token, and gradients go through both lengths.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn

from fastgrpo import models
from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models.attention.joint_complex_rotary import SharedAttention, TrimmedAttention
from fastgrpo.models.flux import Schedule, pack, unpack
from fastgrpo.models.hunyuan_video import both_texts
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import QWEN_2_5_VL_7B
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
from fastgrpo.models.text_encoders.qwen import TextEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "scheduler", "tokenizer")
PIPELINES = ("QwenImagePipeline",)  # whose folders this family reads
PATCH: int = models.declared("flux", "PATCH")
MAX_TEXT_TOKENS = 512  # of a prompt and of the template behind it
REAL: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
PUBLISHED = (("", REAL),)
KEPT = {  # bytes per token and channel, by the bytes of a number
    2: Kept((28.0, 26.0), (56.1, 56.1), (66.1, 53.1), 10.0, moved=(181.4, 171.4)),
    4: Kept((56.0, 52.0), (96.1, 96.1), (116.1, 99.6), 20.0),
}
AUXILIARY = AuxiliaryModels(
    space=8,
    time=1,
    channels=16,
    text=MAX_TEXT_TOKENS,
    encoders=8.29e9,
    texts=(
        QWEN_2_5_VL_7B.read_as("text_encoder", texts=16, longest=34 + MAX_TEXT_TOKENS, around=34),
    ),
    vae=0.1269e9,
    vae_width=96,
    decode_flops=10.8e6,
    decode_bytes=3462,
    graph_bytes=14743,
)
TILED_ABOVE = 2048  # pixels of height or width: then the VAE decodes in tiles, to bound its memory
UNSEEN = ("attn.to_add_out.", "txt_mlp.")
"""Parts of the last block whose text no prediction depends on: they are not trained."""
OF_EDITING = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")
"""Keys of a network's config that text-to-image has not."""


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""

    def split_table(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[N, D] and the text's [L, D] to [n, D] and [L, D]"""
        image, text = tables
        part = layout.sp.part(len(image))
        return image[part.start : part.stop], text

    layout.after(network.img_in, layout.split_tokens)
    layout.after(network.pos_embed, split_table)
    layout.after(network.proj_out, layout.gather_tokens)
    for block in blocks(network):
        layout.process(block.attn, SharedAttention)


class QwenImage:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(self, network: nn.Module, vae: Any, schedule: Schedule, settings: Model) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.schedule = schedule
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch
        self.latent_mean, self.latent_std = (
            torch.tensor(values, device=next(vae.parameters()).device).reshape(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.attention = TrimmedAttention()
        for block in self.blocks:
            block.attn.set_processor(self.attention)  # type: ignore[operator, union-attr]
        for name, parameter in self.blocks[-1].named_parameters():
            if name.startswith(UNSEEN):
                parameter.requires_grad_(False)

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        diffusers_folder.image_only(video, "Qwen-Image")
        factor = 2 ** len(self.vae.config.temperal_downsample)
        size = diffusers_folder.latent_size(video, factor, 1, PATCH)
        return self.vae.config.z_dim, *size

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        _, _, height, width = shape
        return self.schedule.grid(steps, shift, (height // PATCH) * (width // PATCH))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, 1, H, W] float32;  t: [B];  returns like x
        """
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        if self.cfg == 1:
            return unpack(self._predict(x, t, condition["text"], ()), height, width)
        assert self.negative is not None
        text, lengths = both_texts(self.negative["text"], condition["text"])
        without, with_text = self._predict(
            torch.cat([x, x]), torch.cat([t, t]), text, lengths
        ).chunk(2)
        return unpack(guided(without, with_text, self.cfg), height, width)

    def _predict(self, x: Tensor, t: Tensor, text: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """One forward of the network.  x: [B, C, 1, H, W];  text: [B, L, D]

        lengths: of both branches' texts where one is padded
        returns float32 [B, N, 4 C]
        """
        self.attention.lengths = lengths
        shape = (1, x.shape[-2] // PATCH, x.shape[-1] // PATCH)
        (v,) = self.network(
            hidden_states=pack(x).to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            timestep=t,
            img_shapes=[[shape]] * len(x),
            return_dict=False,
        )
        return v.float()

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, 1, H, W] float32 to the VAE's frames [B, 3, 1, H, W], about -1 to 1."""
        side = max(x.shape[-2:]) * 2 ** len(self.vae.config.temperal_downsample)
        self.vae.use_tiling = side > TILED_ABOVE
        latents = (x * self.latent_std + self.latent_mean).to(self.vae.dtype)
        frames: Tensor = self.vae.decode(latents).sample
        return frames

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, 1, H, W] float32 to pixels, uint8 [B, 1, H, W, 3]."""
        return diffusers_folder.decode(self.frames, x, condition, self.decode_batch or len(x))


def guided(without: Tensor, with_text: Tensor, scale: float) -> Tensor:
    """u + s (c - u), each token scaled to the length of c.  [B, N, D] each"""
    both = without + scale * (with_text - without)
    return both * (with_text.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    texts = TextEncoder(where, settings.torch_dtype, device, MAX_TEXT_TOKENS)
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's blocks."""
    return [*network.transformer_blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> QwenImage:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    diffusers_folder.refuse_guidance(settings, "Qwen-Image")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    schedule = Schedule(diffusers_folder.scheduler_config(where))
    vae = diffusers_folder.read(AutoencoderKLQwenImage, where / "vae", settings.torch_dtype)
    network = diffusers_folder.network_folder(settings, NETWORK)
    check_network(diffusers_folder.read_json(network / "config.json"), where, vae.config, settings)
    network = streaming.outline(QwenImageTransformer2DModel, network, device)
    return QwenImage(network, vae.requires_grad_(False).eval().to(device), schedule, settings)


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    for key in OF_EDITING:
        if config.get(key):
            raise UserError(
                f"{named}: the network's config has {key}=true, as models of editing or layers "
                "have; use Qwen-Image or Qwen-Image-2512."
            )
    taken, given = config.get("in_channels"), config.get("out_channels")
    if taken != vae.z_dim * PATCH**2 or given != vae.z_dim or config.get("patch_size", 2) != PATCH:
        raise UserError(
            f"{named}: the network has {taken} channels in and {given} out, and the VAE's "
            f"{vae.z_dim} make {vae.z_dim * PATCH**2} and {vae.z_dim}; use Qwen-Image or "
            "Qwen-Image-2512."
        )
    text = diffusers_folder.read_json(where / "text_encoder" / "config.json")
    made = text.get("text_config", text).get("hidden_size")
    if config.get("joint_attention_dim") != made:
        raise UserError(
            f"{named}: the network takes text of width {config.get('joint_attention_dim')}, the "
            f"text encoder makes {made}; the parts are of different models."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return FamilyPlan(
        network=_sizes(config),
        patch=PATCH,
        auxiliary=AUXILIARY,
        text_width=config["joint_attention_dim"],
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """QwenImageTransformer2DModel of a config, written down."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, text = heads * head, config["joint_attention_dim"]
    rest = Unit("")
    rest.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    rest.norm("txt_norm", text)
    rest.linear("img_in", config["in_channels"], width, VIDEO)
    rest.linear("txt_in", text, width, TEXT)
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, PATCH**2 * config["out_channels"], VIDEO)
    repeated = tuple(_block_sizes(heads, head, number) for number in range(config["num_layers"]))
    return Network(blocks=repeated, rest=rest, width=width, heads=heads, rotary=head)


def _block_sizes(heads: int, head: int, number: int) -> JointBlock:
    """One block: separate weights for image and text, and joint attention."""
    unit, width = JointBlock(f"transformer_blocks.{number}", kept=KEPT), heads * head
    for name, attending, where in (("img", ATTENDING, VIDEO), ("txt", ATTENDING_TEXT, TEXT)):
        unit.linear(f"{name}_mod.1", width, 6 * width, SAMPLE)
        for layer in attending:
            unit.linear(f"attn.{layer}", width, width, where)
        unit.feed_forward(f"{name}_mlp", width, 4 * width, where)
    for layer in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width=width, queries=BOTH, keys=BOTH))
    return unit


def simulated(config: Mapping[str, Any], settings: Model) -> QwenImage:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    schedule: Any = None
    vae: Any = nn.Linear(1, 1)  # in place of one: what is asked of it
    vae.config = SimpleNamespace(latents_mean=[0.0], latents_std=[1.0])
    network = QwenImageTransformer2DModel(**config).train()
    return QwenImage(network, vae, schedule, settings)
