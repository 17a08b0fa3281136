"""Wan 2.1 (1.3 B and 14 B) and Wan 2.2 TI2V-5B, text-to-video (Wan Team 2025, arXiv 2503.20314).

diffusers' unmodified classes. Text is UMT5's states of the prompt's own tokens, followed by zeros
up to the network's 512 places, without a mask: a condition holds the former, `velocity` adds the
latter. Classifier-free guidance runs both branches as one batch. Times are the sigmas of the
folder's scheduler, and the network is told 1000 t.

The official pipeline samples with UniPC, a multistep solver; this one takes UniPC's times and Euler
steps, which are UniPC's of first order, since a policy's transition depends on the last state
alone. So its ODE equals diffusers' WanPipeline with FlowMatchEulerDiscreteScheduler of the same
shift, where the folder names that scheduler, and with UniPC of first order, where it names UniPC;
but for UniPC's rounding the network's times down to whole numbers.

Wan 2.2's 5 B model has a VAE of 16 x 16 pixels per latent place. Its pipeline gives each token a
time of its own (expand_timesteps), which from text alone are all the same: so one time per sample,
without a modulation [tokens, 6, width] in each block, is the same function. Image-to-video is
`wan_i2v.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.policy import Condition, Decoded, networks_of
from fastgrpo.models.attention.pairwise_rotary import SharedAttention
from fastgrpo.models.loading import diffusers_folder, wan_folder
from fastgrpo.models.loading.schedule import EULER, UNIPC, Schedule
from fastgrpo.models.loading.wan_folder import Form
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import UMT5_XXL
from fastgrpo.models.sizes.transformer_blocks import Kept, KeptBy, TokenBlock
from fastgrpo.models.sizes.units import ATTENDING, SAMPLE, TEXT, VIDEO, Attention, Network, Unit
from fastgrpo.models.text_encoders.umt5 import TextEncoder
from fastgrpo.parallel.sequence_parallel import Layout, ShareSequence

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "scheduler", "tokenizer")
PIPELINES = ("WanPipeline",)  # whose folders this family reads
MAX_TEXT_TOKENS = 512  # where the tokenizer does not say fewer; the pipeline's own number
LARGE: dict[str, Any] = {  # 14 B
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
}
TI2V_5B = LARGE | {
    "num_attention_heads": 24,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}
PUBLISHED = (
    ("ti2v-5b", TI2V_5B),
    ("1.3b", LARGE | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    ("", LARGE),
)
"""Parts of a hub id, in lower case, and the network's config; a plan takes the first that fits."""
KEPT = {  # bytes per token and channel, by the bytes of a number, feed-forward left out
    2: Kept((27.1, 0.0), (70.1, 12.0), (86.1, 12.0), 2.0, moved=(338.1, 0.0)),
    4: Kept((54.2, 0.0), (96.1, 24.0), (121.2, 24.0), 4.0),
}
FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2")  # by diffusers in bfloat16, too
HIDDEN_KEPT = {2: 4.0, 4: 8.0}  # bytes per token and channel of the feed-forward's inner layer
AUXILIARY = AuxiliaryModels(
    space=8,
    time=4,
    channels=16,
    text=MAX_TEXT_TOKENS,
    encoders=5.68e9,
    texts=(UMT5_XXL.read_as("text_encoder", texts=16, longest=MAX_TEXT_TOKENS),),
    vae=0.1269e9,
    vae_width=96,
    vae_bytes=4,
    decode_flops=8.7e6,
    decode_bytes=2544,
    graph_bytes=10776,
    tile=(4, 1288, 1288),
    stride=(4, 1024, 1024),
)
AUXILIARY_5B = replace(
    AUXILIARY,
    space=16,
    channels=48,
    vae=0.7047e9,
    vae_width=160,
    decode_flops=18.4e6,
    decode_bytes=2703,
    graph_bytes=8510,
)
TILED_ABOVE = 1280  # pixels of height or width: then the VAE decodes in tiles, to bound its memory


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""

    def split_patches(embedded: Tensor) -> Tensor:
        """[B, C, F, H, W] to [B, C, n, 1, 1]: what follows flattens the three axes"""
        patches = embedded.flatten(2)  # [B, C, N]
        layout.video = patches.shape[2]
        part = layout.sp.part(layout.video)
        return patches[:, :, part.start : part.stop, None, None]

    def split_table(table: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """[1, N, 1, D] each to [1, n, 1, D]"""
        part = layout.sp.part(table[0].shape[1])
        return tuple(of[:, part.start : part.stop] for of in table)

    layout.after(network.rope, split_table)
    layout.after(network.patch_embedding, split_patches)
    layout.after(network.proj_out, layout.gather_tokens)
    for block in blocks(network):
        layout.process(block.attn1, SharedAttention)


Forward = Callable[..., tuple[Tensor]]
"""The trained network, or one of several, as a function of its inputs by name."""


class Wan:
    """The `fastgrpo.core.policy.Policy` of this family."""

    form: ClassVar[Form] = Form(models="Wan 2.1 T2V, TI2V-5B, or model.family=wan_a14b for A14B")
    share_sequence: ShareSequence

    def __init__(
        self,
        network: nn.Module,
        vae: Any,
        schedule: Schedule,
        text_tokens: int,
        settings: Model,
        device: torch.device,
    ) -> None:
        self.network = network
        networks = networks_of(network).values()
        self.blocks: Sequence[nn.Module] = [block for one in networks for block in blocks(one)]
        self.vae = vae
        self.schedule = schedule
        self.text_tokens = text_tokens
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch
        mean, std = (
            torch.tensor(values, device=device)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.latent_mean, self.latent_std = mean.reshape(-1, 1, 1, 1), std.reshape(-1, 1, 1, 1)

    @classmethod
    def simulated_network(cls, config: Mapping[str, Any]) -> nn.Module:
        """The trained network of a config, with weights of any values."""
        network: nn.Module = WanTransformer3DModel(**config)
        return network

    @classmethod
    def outline(cls, where: Path, vae: Any, settings: Model, device: torch.device) -> nn.Module:
        """The trained network without weights.  vae: the VAE's config

        Raises UserError for one of another form.
        """
        folder = diffusers_folder.network_folder(settings, NETWORK)
        return wan_folder.outline(
            folder, where, vae=vae, settings=settings, device=device, form=cls.form
        )

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        config: Any = self.vae.config
        net: Any = self.network.config
        patch = net.patch_size[-1]
        size = diffusers_folder.latent_size(
            video, config.scale_factor_spatial, config.scale_factor_temporal, patch
        )
        return config.z_dim, *size

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        return self.schedule.grid(steps, shift)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        return self._guided(x, t, condition, self.cfg, self.network)

    def _guided(
        self, x: Tensor, t: Tensor, condition: Condition, cfg: float, network: Forward
    ) -> Tensor:
        """A network's velocity with guidance of this scale.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        text, image = self._padded(condition["text"]), condition.get("image_states")
        if cfg == 1:
            return self._predict(x, t, text, image, network)
        assert self.negative is not None
        text = torch.cat([self._padded(self.negative["text"]).expand_as(text), text])
        x, t = torch.cat([x, x]), torch.cat([t, t])
        image = None if image is None else torch.cat([image, image])
        without, with_text = self._predict(x, t, text, image, network).chunk(2)
        return without + cfg * (with_text - without)

    def _padded(self, text: Tensor) -> Tensor:
        """Zeros after the prompt's own tokens, which the network attends to.

        [..., L, D] to [..., text_tokens, D]
        """
        return pad(text, (0, 0, 0, self.text_tokens - text.shape[-2]))

    def _predict(
        self, x: Tensor, t: Tensor, text: Tensor, image: Tensor | None, network: Forward
    ) -> Tensor:
        """One forward of a network.

        text: [B, text_tokens, D];  image: states of a reference image [B, L, E], where it sees any
        """
        (v,) = network(
            hidden_states=x.to(self.dtype),
            timestep=self._times(x, t * self.schedule.timesteps),
            encoder_hidden_states=text.to(self.dtype),
            encoder_hidden_states_image=None if image is None else image.to(self.dtype),
            return_dict=False,
        )
        return v.float()

    def _times(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's times of a batch x, one for each sample.  t: [B];  returns [B]"""
        return t

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F, H, W] float32 to the VAE's frames [B, 3, F, H, W], about -1 to 1."""
        side = max(x.shape[-2:]) * self.vae.config.scale_factor_spatial
        self.vae.use_tiling = side > TILED_ABOVE
        latents = (x * self.latent_std + self.latent_mean).to(self.vae.dtype)
        with diffusers_folder.tf32_convolutions():  # the VAE is in float32
            return self.vae.decode(latents).sample

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, F, H, W] float32 to pixels, uint8 [B, F, H, W, 3]."""
        return diffusers_folder.decode(self.frames, x, condition, self.decode_batch or len(x))


W = TypeVar("W", bound=Wan)


def text_tokens(where: Path) -> int:
    """Places for text in the network's sequence: what the folder's tokenizer takes at most, or
    512.
    """
    config = diffusers_folder.read_json(where / "tokenizer" / "tokenizer_config.json")
    return int(min(config.get("model_max_length") or MAX_TEXT_TOKENS, MAX_TEXT_TOKENS))


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    texts = TextEncoder(where, settings.torch_dtype, device, text_tokens(where))
    with diffusers_folder.freed(texts):
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's blocks."""
    return [*network.blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> Wan:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.

    The VAE is loaded in float32, as the model's authors have it.
    """
    return load_as(Wan, settings, device)


def load_as(kind: type[W], settings: Model, device: torch.device) -> W:
    """`load`, as a policy of this class."""
    diffusers_folder.refuse_guidance(settings, "Wan")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    wan_folder.check_pipeline(
        diffusers_folder.read_json(where / "model_index.json"), settings, kind.form
    )
    schedule = Schedule(diffusers_folder.scheduler_config(where), (UNIPC, EULER), "Wan")
    vae = diffusers_folder.read(AutoencoderKLWan, where / "vae", torch.float32)
    network = kind.outline(where, vae.config, settings, device)
    vae = vae.requires_grad_(False).eval().to(device)
    return kind(
        network,
        vae=vae,
        schedule=schedule,
        text_tokens=kind.form.places or text_tokens(where),
        settings=settings,
        device=device,
    )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config."""
    return sizes(config, KEPT, times=SAMPLE)


def sizes(
    config: Mapping[str, Any], kept: KeptBy, times: str, parts: Sequence[str] = ("",)
) -> FamilyPlan:
    """Sizes with networks of this config whose blocks keep so many bytes.

    times: what has a time of its own: SAMPLE, or VIDEO for each token;  parts: of the folder, where
    there are several networks
    """
    sides = config["patch_size"]
    network, *others = (_sizes(config, kept, times, part) for part in parts)
    network = replace(network, others=tuple(others))
    beside = AUXILIARY_5B if config["in_channels"] == TI2V_5B["in_channels"] else AUXILIARY
    return FamilyPlan(
        network=network, patch=sides[-1], auxiliary=beside, text_width=config["text_dim"]
    )


def _sizes(config: Mapping[str, Any], kept: KeptBy, times: str, part: str) -> Network:
    """WanTransformer3DModel of a config, written down."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, kernel = heads * head, config["patch_size"]
    rest = Unit(part)
    rest.weights[rest.full("scale_shift_table")] = (1, 2, width)
    rest.conv("patch_embedding", config["in_channels"], width, kernel)
    rest.embedder("condition_embedder.time_embedder", config["freq_dim"], width, times)
    rest.linear("condition_embedder.time_proj", width, 6 * width, times)
    rest.embedder("condition_embedder.text_embedder", config["text_dim"], width, TEXT)
    rest.linear("proj_out", width, config["out_channels"] * math.prod(kernel), VIDEO)
    names = (rest.full(f"blocks.{n}") for n in range(config["num_layers"]))
    repeated = tuple(_block_sizes(config, kept, name) for name in names)
    return Network(
        blocks=repeated, rest=rest, width=width, heads=heads, rotary=head, float32=FLOAT32
    )


def _block_sizes(config: Mapping[str, Any], kept: KeptBy, name: str) -> TokenBlock:
    """One block: self-attention, attention to the text, feed-forward."""
    width, hidden = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    kept = {size: of.with_more(HIDDEN_KEPT[size] * hidden / width) for size, of in kept.items()}
    unit = TokenBlock(name, kept=kept)
    unit.weights[f"{unit.name}.scale_shift_table"] = (1, 6, width)
    for attention, keys in (("attn1", VIDEO), ("attn2", TEXT)):
        for layer, where in zip(ATTENDING, (VIDEO, keys, keys, VIDEO), strict=True):
            unit.linear(f"{attention}.{layer}", width, width, where)
        unit.norm(f"{attention}.norm_q", width)
        unit.norm(f"{attention}.norm_k", width)
        unit.attentions.append(Attention(width=width, queries=VIDEO, keys=keys))
    if config.get("cross_attn_norm", True):
        unit.norm("norm2", width, bias=True)
    unit.feed_forward("ffn", width, hidden, VIDEO)
    return unit


def simulated(config: Mapping[str, Any], settings: Model) -> Wan:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    return simulated_as(Wan, config, settings)


def simulated_as(kind: type[W], config: Mapping[str, Any], settings: Model) -> W:
    """`simulated`, as a policy of this class."""
    vae = SimpleNamespace(config=SimpleNamespace(latents_mean=[0.0], latents_std=[1.0]))
    schedule: Any = SimpleNamespace(timesteps=1000)
    return kind(
        kind.simulated_network(config).train(),
        vae=vae,
        schedule=schedule,
        text_tokens=MAX_TEXT_TOKENS,
        settings=settings,
        device=torch.device("cpu"),
    )
