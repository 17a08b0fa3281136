"""Stable Diffusion 1.x and 2.x, text-to-image, as DanceGRPO and DDPO train it.

Rombach et al. 2022, arXiv 2112.10752.

diffusers' unmodified UNet, and DDIM with noise (Song et al. 2021, arXiv 2010.02502) as the sampler:
its eta is rollout.eta, 1 in the papers. Betas, spacing of the timesteps, kind of prediction and the
last step's alpha are those of the folder's scheduler, read as diffusers' DDIMScheduler reads them,
whichever scheduler the folder names. Times are timesteps over the training timesteps, so a grid
starts below 1 (0.981 with 50 steps).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Decoded
from fastgrpo.models.loading import diffusers_folder, streaming
from fastgrpo.models.placement.text_network import Work
from fastgrpo.models.sizes.family_plan import AuxiliaryModels, FamilyPlan
from fastgrpo.models.sizes.text_encoders import AT_WORK, CLIP_L
from fastgrpo.models.sizes.unet import unet
from fastgrpo.models.text_encoders import token_limit
from fastgrpo.models.text_encoders.passes import InPasses, Pass
from fastgrpo.parallel.sequence_parallel import ShareSequence

NETWORK = "unet"
PARTS = ("vae", "text_encoder", "scheduler", "tokenizer")
PIPELINES = ("StableDiffusionPipeline",)  # whose folders this family reads
NOT_SUPPORTED = (  # configuration of a UNet that wants inputs which this file does not make
    "time_cond_proj_dim",
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
)
PREDICTIONS = ("epsilon", "v_prediction")
TEXT_BATCH = 32  # prompts per forward pass of the text encoder
VERSION_1: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
PUBLISHED = (("", VERSION_1),)
"""Parts of a hub id, in lower case, and the network's config; a plan takes the first that fits."""
AUXILIARY = AuxiliaryModels(
    space=8,
    time=1,
    channels=4,
    text=77,
    encoders=0.123e9,
    texts=(CLIP_L.read_as("text_encoder", texts=TEXT_BATCH, longest=77),),
    vae=0.0838e9,
    decode_flops=9.6e6,
    decode_bytes=1536,
    graph_bytes=11632,
)
# in timesteps: where a grid ends on the real timestep 0, which is not the clean sample at t = 0
TIMESTEP_ZERO = 0.25


class Schedule:
    """The folder's noise schedule: alphas on the device, and the timesteps of a sampler."""

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        where = "model.path: scheduler/scheduler_config.json"
        if "beta_schedule" not in config and config.get("trained_betas") is None:
            raise UserError(
                f"{where} is a {config.get('_class_name')}, not one of a diffusion; correct "
                "model.family."
            )
        for key in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
            if config.get(key):
                raise UserError(
                    f"{where} has {key}=true, which is not for latents; set it to false there."
                )
        prediction = config.get("prediction_type", PREDICTIONS[0])
        if prediction not in PREDICTIONS:
            raise UserError(
                f"{where} has prediction_type={prediction}; this family knows "
                f"{' and '.join(PREDICTIONS)}."
            )
        self.predicts_v = prediction == "v_prediction"
        self.scheduler = DDIMScheduler.from_config({**config, "clip_sample": False})
        self.timesteps: int = self.scheduler.config.num_train_timesteps
        final = self.scheduler.final_alpha_cumprod.reshape(1)
        # [timesteps + 1], the last at t = 0
        self.alphas = torch.cat([self.scheduler.alphas_cumprod, final]).to(device)

    def timestep(self, t: Tensor) -> Tensor:
        """The network's timestep, a whole number in float32.  t: [...];  returns like t"""
        return (t * self.timesteps).round()

    def alpha(self, t: Tensor) -> Tensor:
        """Cumulative product at t, the final one at t = 0.

        t: scalar or [B];  returns the same shape, float32
        """
        index = torch.where(t > 0, self.timestep(t), self.timesteps)
        return self.alphas.take(index.long())  # indexing by a scalar would wait for the device

    def grid(self, steps: int) -> Tensor:
        """Times of DDIM's timesteps, and 0.  returns float32 [steps + 1]

        Raises UserError for numbers of steps whose timesteps are not those that DDIM itself steps
        to.
        """
        self._check(steps)
        self.scheduler.set_timesteps(steps)
        timesteps: Tensor = self.scheduler.timesteps.double().clamp(min=TIMESTEP_ZERO)
        return torch.cat([timesteps, torch.zeros(1)]).div(self.timesteps).float()

    def _check(self, steps: int) -> None:
        """DDIM goes from a timestep to the one timesteps // steps below it: that must be the grid's
        next one.
        """
        spacing, last, problem = (
            self.scheduler.config.timestep_spacing,
            self.scheduler.config.steps_offset,
            None,
        )
        most = self.timesteps // (last + 1) if spacing == "leading" else self.timesteps
        if spacing == "linspace":
            problem = (
                "DDIM leaves linspace timesteps; set timestep_spacing to leading in "
                "scheduler_config.json"
            )
        elif steps > most:
            problem = f"the schedule has timesteps for at most {most}; use fewer"
        elif spacing == "trailing" and self.timesteps % steps:
            below, above = steps, steps
            while self.timesteps % below:
                below -= 1
            while self.timesteps % above:
                above += 1
            problem = (
                f"trailing timesteps need a divisor of {self.timesteps}; use {below} or {above}"
            )
        if problem:
            raise UserError(f"rollout.steps or evaluate.steps={steps}: {problem}.")


class StableDiffusion:
    """The `fastgrpo.core.policy.Policy` of this family."""

    share_sequence: ShareSequence

    def __init__(
        self, network: nn.Module, vae: nn.Module, schedule: Schedule, settings: Model
    ) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.schedule = schedule
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        diffusers_folder.image_only(video, "Stable Diffusion")
        config: Any = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, *diffusers_folder.latent_size(video, factor, 1, 1)

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        """Times of the sampler, float32 [steps + 1] from 1 to 0.  shape: (C, F, H, W)"""
        if shift is not None:
            raise UserError(
                f"rollout.shift={shift}: Stable Diffusion's times are its scheduler's timesteps, "
                "which have no shift; "
                "leave it out."
            )
        return self.schedule.grid(steps)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict noise or v, as the network does: `transition` and `clean_estimate` know which.

        x: [B, C, 1, H, W] float32;  t: [B];  returns like x
        """
        text = condition["text"]
        if self.cfg == 1:
            return self._predict(x, t, text)
        assert self.negative is not None
        text = torch.cat([self.negative["text"].expand_as(text), text])
        without, with_text = self._predict(torch.cat([x, x]), torch.cat([t, t]), text).chunk(2)
        return without + self.cfg * (with_text - without)

    def _predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """One forward of the network.  text: [B, L, D]"""
        timestep = self.schedule.timestep(t)
        (prediction,) = self.network(
            x.squeeze(2).to(self.dtype),
            timestep,
            encoder_hidden_states=text.to(self.dtype),
            return_dict=False,
        )
        return prediction.float().unsqueeze(2)

    def transition(
        self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """One step of DDIM, see `transitions.ddim_transition`.

        x, v: [B, C, 1, H, W];  t, t_next: scalars or [B];  returns mean like x, and std
        At eta <= 1 the noise's share of x_next is never negative.
        """
        if not 0 <= eta <= 1:
            raise UserError(
                f"rollout.eta={eta}: DDIM's noise is a share of what ancestral sampling adds; use "
                "at most 1."
            )
        alpha, alpha_next = self.schedule.alpha(t), self.schedule.alpha(t_next)
        return transitions.ddim_transition(
            x, epsilon=self._noise(x, v, alpha), alpha=alpha, alpha_next=alpha_next, eta=eta
        )

    def _noise(self, x: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        """The noise in x that the prediction implies (v: Salimans and Ho 2022, arXiv 2202.00512).

        [B, C, 1, H, W]
        """
        if not self.schedule.predicts_v:
            return v
        alpha = alpha.reshape(-1, *(1,) * (x.ndim - 1))
        return alpha.sqrt() * v + (1 - alpha).sqrt() * x

    def clean_estimate(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the prediction implies.  x, v: [B, C, 1, H, W];  t: [B] or a scalar"""
        return self.transition(x, v=v, t=t, t_next=torch.zeros_like(t), eta=0.0)[0]

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F, H, W] float32 to the VAE's frames [B, 3, F, H, W], about -1 to 1."""
        vae: Any = self.vae
        latents = (x / vae.config.scaling_factor).squeeze(2).to(vae.dtype)
        frames: Tensor = vae.decode(latents).sample.unsqueeze(2)
        return frames

    def decode(self, x: Tensor, condition: Condition) -> Decoded:
        """Latents [B, C, F, H, W] float32 to pixels, uint8 [B, F, H, W, 3]."""
        at_once = self.decode_batch or diffusers_folder.images_at_once(self.vae, x)
        return diffusers_folder.decode(self.frames, x, condition, at_once)


class TextEncoder(InPasses):
    """This family's `Encoder`: CLIP's states of all its token places, padding included."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.batch = device, TEXT_BATCH
        self.tokenizer, self.clip = diffusers_folder.text_model(
            where, tokenizer="tokenizer", encoder="text_encoder", dtype=dtype, device=device
        )
        self.clip.work = Work(TEXT_BATCH, self.tokenizer.model_max_length, AT_WORK["clip"])

    def passes(self) -> Sequence[Pass]:
        return (self.reading(self.clip, self._states),)

    def has_tokens(self, text: str) -> bool:
        return bool(self.tokenizer(text, add_special_tokens=False).input_ids)

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        seen = token_limit.cut(self.tokenizer, text, self.tokenizer.model_max_length)
        return {"text_encoder": seen} if seen else {}

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Condition]:
        """returns "text" [L, D] each, float32 on the CPU, L = the tokenizer's longest text, 77"""
        longest = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = (
            tokens.attention_mask
            if getattr(self.clip.config, "use_attention_mask", False)
            else None
        )
        states: Tensor = self.clip(tokens.input_ids, attention_mask=mask).last_hidden_state
        return [{"text": own} for own in states.float().cpu()]


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    with diffusers_folder.freed(TextEncoder(where, settings.torch_dtype, device)) as texts:
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The levels of the UNet: down, middle, up."""
    return [*network.down_blocks, network.mid_block, *network.up_blocks]  # type: ignore[misc, list-item]


def load(settings: Model, device: torch.device) -> StableDiffusion:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights
    yet.
    """
    diffusers_folder.refuse_guidance(settings, "Stable Diffusion")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    schedule = Schedule(diffusers_folder.scheduler_config(where), device)
    network = streaming.outline(
        UNet2DConditionModel, diffusers_folder.network_folder(settings, NETWORK), device
    )
    vae = diffusers_folder.read(AutoencoderKL, where / "vae", settings.torch_dtype)
    check_parts(
        network.config,
        vae.config,
        diffusers_folder.read_json(where / "text_encoder" / "config.json"),
    )
    return StableDiffusion(network, vae.requires_grad_(False).eval().to(device), schedule, settings)


def check_parts(network: Any, vae: Any, text: Mapping[str, Any]) -> None:
    """The configs of UNet, VAE and text encoder fit together, and the UNet wants nothing else.

    Raises UserError.
    """
    for key in NOT_SUPPORTED:
        if network.get(key) is not None:
            raise UserError(
                f"model.path: unet/config.json has {key}={network[key]}; this family trains UNets "
                "of Stable Diffusion "
                "1.x and 2.x, which have none."
            )
    if network.in_channels != network.out_channels:
        raise UserError(
            f"model.path: unet/config.json has in_channels={network.in_channels}, for inpainting "
            "or editing; "
            "use a text-to-image model."
        )
    if network.in_channels != vae.latent_channels or network.cross_attention_dim != text.get(
        "hidden_size"
    ):
        raise UserError(
            f"model.path: the UNet takes {network.in_channels} latent channels and text of width "
            f"{network.cross_attention_dim}, the VAE makes {vae.latent_channels} and the text "
            "encoder "
            f"{text.get('hidden_size')}; the parts are of different models."
        )


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a UNet of this config."""
    width = config["cross_attention_dim"]
    return FamilyPlan(network=unet(config), patch=1, auxiliary=AUXILIARY, text_width=width)


def simulated(config: Mapping[str, Any], settings: Model) -> StableDiffusion:
    """The policy around a UNet of this config, without VAE and times: for a simulated rank."""
    schedule: Any = SimpleNamespace(timestep=lambda t: t * 1000)
    return StableDiffusion(UNet2DConditionModel(**config).train(), nn.Module(), schedule, settings)
