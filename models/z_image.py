"""Z-Image and Z-Image-Turbo, text-to-image (Tongyi Lab 2025, arXiv 2511.22699).

diffusers' modules, unmodified, and a forward of our own in place of their class's, which takes
lists of single samples and masks what pads the shorter texts in every block, so that flash
attention is ruled out. Here a batch is a tensor, and guidance's two branches attend each to its own
text: what is attended to is the same. Image and text are one sequence. Both are padded to a
multiple of 32 tokens by tokens that were learned and are attended to, and the image's places begin
behind the padded text.

The network counts time from noise, 1 - t, and predicts what leads away from noise: the velocity is
its opposite. model.cfg is the usual scale, u + s (c - u), and so by one more than the
guidance_scale of diffusers' pipeline. Times stay float32 with weights in bfloat16.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo import models
from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models.attention.single_stream import SharedAttention, Tables, TrimmedAttention
from fastgrpo.models.flux import frames_of, positions
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import QWEN_3_4B
from fastgrpo.models.sizes.transformer_blocks import TIME_CHANNELS, Kept, lumina_block
from fastgrpo.models.sizes.units import BOTH, SAMPLE, TEXT, VIDEO, Network, Unit
from fastgrpo.models.text_encoders.qwen_3 import TrimmedEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "scheduler", "tokenizer")
PIPELINES = ("ZImagePipeline",)  # whose folders this family reads
PATCH: int = models.declared("flux", "PATCH")
MAX_TEXT_TOKENS = 512  # of a prompt's whole chat
MULTIPLE = 32  # to one of which image and text tokens are padded
TIME_HIDDEN = 1024  # channels inside the time's embedder
MODULATION = 256  # channels of the embedded time, at most
REAL: dict[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}
PUBLISHED = (("", REAL),)
KEPT = {  # bytes per token and channel, by the bytes of a number
    2: Kept((27.3, 27.3), (89.4, 89.4), (103.4, 103.4), 2.0, moved=(290.1, 290.1)),
    4: Kept((54.7, 54.7), (130.8, 130.8), (146.8, 146.8), 4.0),
}
TEXT_KEPT = {  # of the blocks of text alone, which do not take the time
    2: Kept((0.0, 27.3), (0.0, 81.4), (0.0, 97.3), moved=(0.0, 274.1)),
    4: Kept((0.0, 54.7), (0.0, 114.8), (0.0, 132.1)),
}
AUXILIARY = AuxiliaryModels(
    space=8,
    time=1,
    channels=16,
    text=MAX_TEXT_TOKENS,
    encoders=4.022e9,
    texts=(
        QWEN_3_4B.read_as("text_encoder", texts=8, longest=MAX_TEXT_TOKENS, around=9, states=True),
    ),
    vae=0.0838e9,
    decode_flops=9.7e6,
    decode_bytes=1537,
    graph_bytes=11633,
)


class ZImageTransformer2DModel(diffusers.ZImageTransformer2DModel):  # type: ignore[misc]
    """diffusers' network with batches of tokens in place of lists and masks.

    Of the same name, which configs and messages say.
    """

    @functools.wraps(diffusers.ZImageTransformer2DModel.__init__)  # type: ignore[misc]  # its keys
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Image tokens [B, N, C] and their complex tables [N, D / 2] go through these, where ranks
        # that share a sequence take their part.
        self.image_tokens, self.image_table = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: Tensor, timestep: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """What leads away from noise, [B, C, 1, H, W].

        hidden_states: [B, C, 1, H, W];  timestep: [B] float32, 0 of noise to 1 of data
        texts: of each part of the batch, one after the other, [b, L, D]
        """
        time = self.t_embedder(timestep * self.t_scale).to(hidden_states.dtype)
        height, width = (size // PATCH for size in hidden_states.shape[-2:])
        image = self.image_tokens(self._image(hidden_states))
        text = self._text(texts)
        lengths = [padded(part.shape[1]) for part in texts]
        if len(set(lengths)) == 1:
            lengths = lengths[:1]
        tables = [self._tables(length, height, width, text.device) for length in lengths]
        of_image, of_text = ([pair[kind] for pair in tables] for kind in (0, 1))
        image = self._run(self.noise_refiner, image, of_image, time)
        text = self._run(self.context_refiner, text, of_text, None)
        both = [torch.cat(pair) for pair in tables]
        own = image.shape[1]
        image = self._run(self.layers, torch.cat([image, text], 1), both, time)[:, :own]
        out = self.all_final_layer[f"{PATCH}-1"](image, c=time)[:, : height * width]
        return rearrange(
            out, "b (h w) (p q c) -> b c 1 (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH
        )

    def _run(self, layers: nn.ModuleList, x: Tensor, tables: Tables, time: Tensor | None) -> Tensor:
        """Tokens [B, S, C] after some blocks.  time: [B, E]"""
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in layers:
            run = (self._gradient_checkpointing_func, block) if recompute else (block,)
            x = run[0](*run[1:], x, None, tables, time)
        return x

    def _image(self, x: Tensor) -> Tensor:
        """Latents [B, C, 1, H, W] to tokens [B, N, D], N a multiple of 32."""
        patches = rearrange(x, "b c 1 (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)
        tokens = self.all_x_embedder[f"{PATCH}-1"](patches)
        count = tokens.shape[1]
        tokens = pad(tokens, (0, 0, 0, padded(count) - count))
        # also where nothing is padded: a weight has a gradient on all ranks, or on none
        return torch.where(beyond(count, tokens), self.x_pad_token, tokens)

    def _text(self, texts: Sequence[Tensor]) -> Tensor:
        """Texts [b, L, D] to tokens [B, M, C], M a multiple of 32 that has room for the longest."""
        longest = padded(max(part.shape[1] for part in texts))
        given = [pad(part, (0, 0, 0, longest - part.shape[1])) for part in texts]
        tokens = self.cap_embedder(torch.cat(given))
        parts = zip(tokens.split([len(part) for part in texts]), texts, strict=True)
        return torch.cat(
            [torch.where(beyond(of.shape[1], x), self.cap_pad_token, x) for x, of in parts]
        )

    def _tables(
        self, length: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rotary tables [N, D / 2] of image tokens and [L, D / 2] of L text tokens, complex.

        height, width: of the image, in tokens
        """
        image = positions(height, width, device).to(torch.int64)
        image[:, 0] = length + 1  # behind the text, which begins at 1
        image = pad(image, (0, 0, 0, padded(len(image)) - len(image)))
        text = torch.zeros(length, 3, dtype=torch.int64, device=device)
        text[:, 0] = torch.arange(1, length + 1, device=device)
        return self.image_table(self.rope_embedder(image)), self.rope_embedder(text)


def padded(tokens: int) -> int:
    """The next multiple of 32."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def beyond(count: int, tokens: Tensor) -> Tensor:
    """Whether a place is behind the first `count`, [S, 1].  tokens: [B, S, C]"""
    return torch.arange(tokens.shape[1], device=tokens.device)[:, None] >= count


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""

    def split_table(table: Tensor) -> Tensor:
        """[N, D] to [n, D]"""
        part = layout.sp.part(len(table))
        return table[part.start : part.stop]

    layout.after(network.image_tokens, layout.split_tokens)
    layout.after(network.image_table, split_table)
    layout.after(network.all_final_layer[f"{PATCH}-1"], layout.gather_tokens)
    for block in [*network.noise_refiner, *network.layers]:
        layout.process(block.attention, SharedAttention)


class ZImage:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(self, network: nn.Module, vae: Any, shift: float, settings: Model) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.shift = shift
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch
        attention = TrimmedAttention()
        for block in self.blocks:
            block.attention.set_processor(attention)  # type: ignore[operator, union-attr]

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        diffusers_folder.image_only(video, "Z-Image")
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = diffusers_folder.latent_size(video, factor, 1, PATCH)
        reach = PATCH * factor * min(self.network.config.axes_lens[1:])  # type: ignore[union-attr, index]
        if max(video.height, video.width) > reach:
            raise UserError(
                f"video.height={video.height}, video.width={video.width}: the network's rotary "
                f"tables reach {reach} pixels; use no more."
            )
        return self.vae.config.latent_channels, *size

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        return transitions.time_grid(steps, shift or self.shift)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, 1, H, W] float32;  t: [B];  returns like x
        """
        text = condition["text"]
        if self.cfg == 1:
            return self._predict(x, t, [text])
        assert self.negative is not None
        negative = self.negative["text"].expand(len(x), -1, -1)
        without, with_text = self._predict(
            torch.cat([x, x]), torch.cat([t, t]), [negative, text]
        ).chunk(2)
        return guided(without, with_text, self.cfg)

    def _predict(self, x: Tensor, t: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """One forward of the network.  x: [B, C, 1, H, W];  texts: as the network's"""
        v: Tensor = self.network(
            hidden_states=x.to(self.dtype),
            timestep=1 - t,
            texts=[text.to(self.dtype) for text in texts],
        )
        return -v.float()

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, 1, H, W] float32 to the VAE's frames [B, 3, 1, H, W], about -1 to 1."""
        return frames_of(self.vae, x)

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, 1, H, W] float32 to pixels, uint8 [B, 1, H, W, 3]."""
        at_once = self.decode_batch or diffusers_folder.images_at_once(self.vae, x)
        return diffusers_folder.decode(self.frames, x, condition, at_once)


def guided(without: Tensor, with_text: Tensor, scale: float) -> Tensor:
    """u + s (c - u).  [B, ...] each"""
    return without + scale * (with_text - without)


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TrimmedEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    texts = TrimmedEncoder(where, settings.torch_dtype, device, MAX_TEXT_TOKENS)
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of image tokens alone, those of text tokens alone, then those of both."""
    return [*network.noise_refiner, *network.context_refiner, *network.layers]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> ZImage:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    diffusers_folder.refuse_guidance(settings, "Z-Image")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    shift = diffusers_folder.constant_shift(where)
    vae = diffusers_folder.read(AutoencoderKL, where / "vae", settings.torch_dtype)
    place = diffusers_folder.network_folder(settings, NETWORK)
    check_network(diffusers_folder.read_json(place / "config.json"), where, vae.config, settings)
    network = streaming.outline(ZImageTransformer2DModel, place, device)
    return ZImage(network, vae.requires_grad_(False).eval().to(device), shift, settings)


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large.

    Raises UserError where it is of another kind.
    """
    named = diffusers_folder.named_network(settings)
    if vae.get("shift_factor") is None:
        raise UserError(
            f"{named}: vae/config.json has no shift_factor, which Z-Image's has; correct "
            "model.family."
        )
    if config.get("siglip_feat_dim") is not None:
        raise UserError(
            f"{named}: the network's config has siglip_feat_dim={config['siglip_feat_dim']}, as "
            "models that see images have; use Z-Image or Z-Image-Turbo."
        )
    for key, only in (("all_patch_size", [PATCH]), ("all_f_patch_size", [1])):
        if list(config.get(key, only)) != only:
            raise UserError(
                f"{named}: the network's config has {key}={list(config[key])}, and Z-Image's has "
                f"{only}; use Z-Image or Z-Image-Turbo."
            )
    if config.get("in_channels") != vae.latent_channels:
        raise UserError(
            f"{named}: the network takes {config.get('in_channels')} channels, the VAE's latents "
            f"have {vae.latent_channels}; the parts are of different models."
        )
    made = diffusers_folder.read_json(where / "text_encoder" / "config.json").get("hidden_size")
    if config.get("cap_feat_dim") != made:
        raise UserError(
            f"{named}: the network takes text of width {config.get('cap_feat_dim')}, the text "
            f"encoder makes {made}; the parts are of different models."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return FamilyPlan(
        network=_sizes(config),
        patch=PATCH,
        auxiliary=AUXILIARY,
        text_width=config["cap_feat_dim"],
    )


def _sizes(config: Mapping[str, Any]) -> Network:
    """ZImageTransformer2DModel of a config, written down."""
    heads, width, text = config["n_heads"], config["dim"], config["cap_feat_dim"]
    taken, time = PATCH**2 * config["in_channels"], min(width, MODULATION)
    rest = Unit("")
    rest.weights["x_pad_token"] = rest.weights["cap_pad_token"] = (1, width)
    rest.linear(f"all_x_embedder.{PATCH}-1", taken, width, VIDEO)
    rest.linear(f"all_final_layer.{PATCH}-1.linear", width, taken, VIDEO)
    rest.linear(f"all_final_layer.{PATCH}-1.adaLN_modulation.1", time, width, SAMPLE)
    rest.linear("t_embedder.mlp.0", TIME_CHANNELS, TIME_HIDDEN, SAMPLE)
    rest.linear("t_embedder.mlp.2", TIME_HIDDEN, time, SAMPLE)
    rest.norm("cap_embedder.0", text)
    rest.linear("cap_embedder.1", text, width, TEXT)
    sizes = {"width": width, "heads": heads, "time": time}
    refiners, layers = range(config["n_refiner_layers"]), range(config["n_layers"])
    repeated = (
        *(lumina_block(f"noise_refiner.{n}", VIDEO, kept=KEPT, **sizes) for n in refiners),
        *(lumina_block(f"context_refiner.{n}", TEXT, kept=TEXT_KEPT, **sizes) for n in refiners),
        *(lumina_block(f"layers.{n}", BOTH, kept=KEPT, **sizes) for n in layers),
    )
    return Network(blocks=repeated, rest=rest, width=width, heads=heads, rotary=width // heads)


def simulated(config: Mapping[str, Any], settings: Model) -> ZImage:
    """The policy around a network of this config, without a VAE: all that a simulated rank runs."""
    network = ZImageTransformer2DModel(**config).train()
    return ZImage(network, nn.Module(), shift=1.0, settings=settings)
