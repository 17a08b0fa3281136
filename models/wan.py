"""Wan 2.1, text-to-video (Wan Team 2025, arXiv 2503.20314), 1.3 B and 14 B.

diffusers' unmodified classes. Text is UMT5's states of the prompt's own tokens, followed by zeros up to the network's
512 places, without a mask: a condition holds the former, `velocity` adds the latter. Classifier-free guidance runs both
branches as one batch. Times are the sigmas of the folder's scheduler, and the network is told 1000 t.

The official pipeline samples with UniPC, a multistep solver; this one takes UniPC's times and Euler steps, which are
UniPC's of first order, since a policy's transition depends on the last state alone. So its ODE equals diffusers'
WanPipeline with FlowMatchEulerDiscreteScheduler of the same shift, where the folder names that scheduler, and with
UniPC of first order, where it names UniPC; but for UniPC's rounding the network's times down to whole numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo.algorithm import transitions
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.models.loading import diffusers_folder, streaming

NETWORK = "transformer"
PARTS = ("vae", "text_encoder", "scheduler", "tokenizer")
PIPELINES = ("WanPipeline",)  # whose folders this family reads
MAX_TEXT_TOKENS = 512  # where the tokenizer does not say fewer; the pipeline's own number
UNIPC_SETTINGS = {  # of a flow model; without them UniPC's sigmas are not times
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "final_sigmas_type": "zero",
}
TEXT_BATCH = 16  # prompts per forward pass of the text encoder
TILED_ABOVE = 160  # latent height or width (1280 pixels) from which the VAE decodes in tiles, to bound its memory


class Schedule:
    """The times of the folder's scheduler."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        where = "model.path: scheduler/scheduler_config.json"
        kinds = {kind.__name__: kind for kind in (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler)}
        name = config.get("_class_name")
        if name not in kinds:
            raise UserError(f"{where} is a {name}, not one of {', '.join(kinds)}; correct model.family.")
        self.kind: Any = kinds[name]
        self.shift_key = "flow_shift" if self.kind is UniPCMultistepScheduler else "shift"
        fixed: dict[str, Any] = {"use_dynamic_shifting": False}  # the pipeline does not say by what
        fixed |= UNIPC_SETTINGS if self.kind is UniPCMultistepScheduler else {"invert_sigmas": False}
        known = self.kind.from_config(config).config
        for key, value in fixed.items():
            if known[key] != value:
                raise UserError(f"{where} has {key}={known[key]}; Wan 2.1 wants {value}, set it there.")
        self.config = dict(config)
        self.timesteps: int = known.num_train_timesteps  # the network's time at t = 1

    def grid(self, steps: int, shift: float | None) -> Tensor:
        """returns float32 [steps + 1], falling to 0.  shift: in place of the folder's"""
        scheduler = self.kind.from_config(self.config if shift is None else self.config | {self.shift_key: shift})
        scheduler.set_timesteps(steps)
        times: Tensor = scheduler.sigmas
        return times


class Wan:
    """The `fastgrpo.core.policy.Policy` of this family."""

    def __init__(
        self, network: nn.Module, vae: Any, schedule: Schedule, text_tokens: int, settings: Model, device: torch.device
    ) -> None:
        self.network = network
        self.blocks: Sequence[nn.Module] = blocks(network)
        self.vae = vae
        self.schedule = schedule
        self.text_tokens = text_tokens
        self.cfg = settings.cfg
        self.negative: Condition | None = None
        self.dtype = settings.torch_dtype
        self.decode_batch = settings.decode_batch
        mean, std = (
            torch.tensor(values, device=device) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.latent_mean, self.latent_std = mean.reshape(-1, 1, 1, 1), std.reshape(-1, 1, 1, 1)

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        config: Any = self.vae.config
        net: Any = self.network.config
        patch = net.patch_size[-1]
        size = diffusers_folder.latent_size(video, config.scale_factor_spatial, config.scale_factor_temporal, patch)
        return config.z_dim, *size

    def time_grid(self, steps: int, shift: float | None, shape: tuple[int, ...]) -> Tensor:
        return self.schedule.grid(steps, shift)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        text = self._padded(condition["text"])
        if self.cfg == 1:
            return self._predict(x, t, text)
        assert self.negative is not None
        text = torch.cat([self._padded(self.negative["text"]).expand_as(text), text])
        without, with_text = self._predict(torch.cat([x, x]), torch.cat([t, t]), text).chunk(2)
        return without + self.cfg * (with_text - without)

    def _padded(self, text: Tensor) -> Tensor:
        """Zeros after the prompt's own tokens, which the network attends to.  [..., L, D] to [..., text_tokens, D]"""
        return pad(text, (0, 0, 0, self.text_tokens - text.shape[-2]))

    def _predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """One forward of the network.  text: [B, text_tokens, D]"""
        (v,) = self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * self.schedule.timesteps,
            encoder_hidden_states=text.to(self.dtype),
            return_dict=False,
        )
        return v.float()

    transition = staticmethod(transitions.sde_transition)
    clean_estimate = staticmethod(transitions.clean_estimate)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        self.vae.use_tiling = max(x.shape[-2:]) > TILED_ABOVE
        latents = (x * self.latent_std + self.latent_mean).to(self.vae.dtype)
        parts = latents.split(self.decode_batch or len(x))
        return torch.cat([diffusers_folder.to_pixels(self.vae.decode(part).sample) for part in parts])


class TextEncoder:
    """This family's `Encoder`: UMT5's states of the prompt's own tokens and the closing one."""

    def __init__(self, where: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.longest = text_tokens(where)
        self.tokenizer, self.umt5 = diffusers_folder.text_model(where, "tokenizer", "text_encoder", dtype, device)

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        texts = [prompt.text for prompt in prompts]
        for text in texts:
            if not self.tokenizer(prompt_clean(text), add_special_tokens=False).input_ids:
                raise UserError(f"prompts: '{text}' has no tokens for the text encoder; leave it out.")
        parts = [self._states(texts[start : start + TEXT_BATCH]) for start in range(0, len(texts), TEXT_BATCH)]
        return [{"text": states} for part in parts for states in part]

    def negative(self, text: str) -> Condition:
        return {"text": self._states([text])[0]}

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Tensor]:
        """returns float32 [L, D] each on the CPU, L = its tokens. HTML and broken Unicode are mended first."""
        tokens = self.tokenizer(
            [prompt_clean(text) for text in texts],
            padding="max_length",
            max_length=self.longest,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.umt5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float().cpu()
        return [row[:length] for row, length in zip(states, tokens.attention_mask.sum(1).tolist(), strict=True)]


def text_tokens(where: Path) -> int:
    """Places for text in the network's sequence: what the folder's tokenizer takes at most, or 512."""
    config = diffusers_folder.read_json(where / "tokenizer" / "tokenizer_config.json")
    return int(min(config.get("model_max_length") or MAX_TEXT_TOKENS, MAX_TEXT_TOKENS))


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[TextEncoder]:
    """The text encoder of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    with diffusers_folder.freed(TextEncoder(where, settings.torch_dtype, device)) as texts:
        yield texts


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's blocks."""
    return [*network.blocks]  # type: ignore[misc]


def load(settings: Model, device: torch.device) -> Wan:
    """The policy of a folder in the diffusers layout, or of a hub id; its network has no weights yet.

    The VAE is loaded in float32, as the model's authors have it.
    """
    if settings.guidance is not None:
        raise UserError(f"model.guidance={settings.guidance}: Wan has no embedded guidance; set model.cfg instead.")
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    check_pipeline(diffusers_folder.read_json(where / "model_index.json"), settings)
    schedule = Schedule(diffusers_folder.scheduler_config(where))
    vae = diffusers_folder.read(AutoencoderKLWan, where / "vae", torch.float32)
    network = diffusers_folder.network_folder(settings, NETWORK)
    check_network(diffusers_folder.read_json(network / "config.json"), where, vae.config, settings)
    network = streaming.outline(WanTransformer3DModel, network, device)
    vae = vae.requires_grad_(False).eval().to(device)
    return Wan(network, vae, schedule, text_tokens(where), settings, device)


def check_pipeline(index: Mapping[str, Any], settings: Model) -> None:
    """Raise UserError for Wan 2.2, whose pipelines have two networks or a time for each token."""
    two = any(index.get("transformer_2") or ())
    for key, told in (("transformer_2", two), *((k, index.get(k)) for k in ("boundary_ratio", "expand_timesteps"))):
        if told:
            raise UserError(
                f"model.path={settings.path}: model_index.json has {key}, as Wan 2.2 does; use a text-to-video "
                "model of Wan 2.1."
            )


def check_network(config: Mapping[str, Any], where: Path, vae: Any, settings: Model) -> None:
    """The network's config, read before its weights, which are large. Raises UserError where it is of another kind."""
    named = f"model.path={settings.path}" if settings.network is None else f"model.network={settings.network}"
    taken, given, patch = (config.get(key) for key in ("in_channels", "out_channels", "patch_size"))
    images = config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None
    if images or not taken == given == vae.z_dim:
        raise UserError(
            f"{named}: the network has {taken} channels in and {given} out{' and sees images' if images else ''}, the "
            f"VAE {vae.z_dim}; use a text-to-video model of Wan 2.1."
        )
    if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        raise UserError(f"{named}: the network's patch_size is {patch}, not [1, n, n]; use a model of Wan 2.1.")
    made = diffusers_folder.read_json(where / "text_encoder" / "config.json").get("d_model")
    if config.get("text_dim") != made:
        raise UserError(
            f"{named}: the network takes text of width {config.get('text_dim')}, the text encoder makes {made}; the "
            "parts are of different models."
        )
