"""HunyuanVideo, text-to-video and, with one frame, text-to-image (Kong et al. 2024, arXiv 2412.03603).

diffusers' unmodified classes, and the embedded guidance of the distilled checkpoint. Two departures from diffusers'
pipeline, both exact: text is trimmed to its own length and blocks attend without a mask (a batch never mixes lengths),
so that the fastest attention kernels apply; and the guidance stays in float32 (the pipeline rounds 6000 to 6016 in
bfloat16).
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from fastgrpo import flow
from fastgrpo.config import Model, Video
from fastgrpo.errors import UserError
from fastgrpo.models import Condition

TRAIN_TIMESTEPS = 1000  # the network's time unit: t = 1 is timestep 1000
SKIPPED_LAYERS = 2  # of the Llama: the text features are the third hidden state from the end
MAX_TEXT_TOKENS = 256
MAX_CLIP_TOKENS = 77
TEXT_BATCH = 32  # prompts per forward pass of the text encoders


class UnmaskedAttention(HunyuanVideoAttnProcessor2_0):  # type: ignore[misc]
    """diffusers' attention without the mask, which is all ones for trimmed text and rules flash attention out."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


class HunyuanVideo:
    """The `fastgrpo.models.Policy` of this family."""

    def __init__(self, network: nn.Module, vae: nn.Module, folder: Path, settings: Model) -> None:
        self.network = network
        self.blocks = [*network.transformer_blocks, *network.single_transformer_blocks]  # type: ignore[misc]
        self.vae = vae
        self.folder = folder
        self.guidance = settings.guidance
        self.dtype = getattr(torch, settings.dtype)
        self.shift = float(json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"])
        for block in self.blocks:
            block.attn.set_processor(UnmaskedAttention())
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        config: Any = self.vae.config
        space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
        net: Any = self.network.config
        unit = space * net.patch_size
        for name, size in (("height", video.height), ("width", video.width)):
            if size % unit:
                raise UserError(
                    f"video.{name}={size}: not a multiple of {unit} (VAE factor {space} x patch {net.patch_size}); "
                    f"use {max(size // unit, 1) * unit} or {(size // unit + 1) * unit}."
                )
        if (video.frames - 1) % time:
            below = (video.frames - 1) // time * time + 1
            raise UserError(
                f"video.frames={video.frames}: must be a multiple of {time}, plus 1; use {below} or {below + time}."
            )
        return net.out_channels, (video.frames - 1) // time + 1, video.height // space, video.width // space

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        texts = self._llama_features(prompts)
        pooled = self._clip_features(prompts)
        gc.collect()
        return [{"text": text, "pooled": pool} for text, pool in zip(texts, pooled, strict=True)]

    def _llama_features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Hidden states of the prompt's own tokens and the closing one.  returns [L, D] each, L = its length"""
        tokenizer, encoder = self._text_model("tokenizer", "text_encoder")
        template = DEFAULT_PROMPT_TEMPLATE["template"]
        crop = len(tokenizer(template.split("{}")[0])["input_ids"])  # 95 with Llama 3's tokenizer
        features: list[Tensor] = []
        for start in range(0, len(prompts), TEXT_BATCH):
            batch = [template.format(prompt) for prompt in prompts[start : start + TEXT_BATCH]]
            tokens = tokenizer(
                batch,
                max_length=MAX_TEXT_TOKENS + crop,
                padding="longest",
                padding_side="right",
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            states = encoder(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
            ).hidden_states[-(SKIPPED_LAYERS + 1)]
            for row, mask in zip(states, tokens.attention_mask, strict=True):
                features.append(row[crop : int(mask.sum())].float().cpu())
        return features

    def _clip_features(self, prompts: Sequence[str]) -> list[Tensor]:
        """Pooled CLIP output of the raw prompts.  returns [D] each"""
        tokenizer, encoder = self._text_model("tokenizer_2", "text_encoder_2")
        features: list[Tensor] = []
        for start in range(0, len(prompts), TEXT_BATCH):
            tokens = tokenizer(
                list(prompts[start : start + TEXT_BATCH]),
                padding="max_length",
                max_length=MAX_CLIP_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            features.extend(encoder(tokens.input_ids.to(self.device)).pooler_output.float().cpu())
        return features

    def _text_model(self, tokenizer: str, encoder: str) -> tuple[Any, Any]:
        """A tokenizer and its encoder, of the classes that the folder names."""
        import transformers

        index = json.loads((self.folder / "model_index.json").read_text())
        tokenizer_class = getattr(transformers, index[tokenizer][1])
        encoder_class = getattr(transformers, index[encoder][1])
        model = _read(encoder_class, self.folder / encoder, self.dtype)
        return tokenizer_class.from_pretrained(self.folder / tokenizer), model.to(self.device).eval()

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        text = condition["text"].to(self.dtype)
        guidance = None
        if self.network.config.guidance_embeds:  # type: ignore[union-attr]
            guidance = torch.full_like(t, self.guidance * 1000.0)
        (v,) = self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * TRAIN_TIMESTEPS,
            encoder_hidden_states=text,
            encoder_attention_mask=torch.ones(text.shape[:2], dtype=torch.bool, device=text.device),
            pooled_projections=condition["pooled"].to(self.dtype),
            guidance=guidance,
            return_dict=False,
        )
        return v.float()

    transition = staticmethod(flow.sde_transition)
    clean_estimate = staticmethod(flow.clean_estimate)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        config: Any = self.vae.config
        vae: Any = self.vae
        frames = vae.decode(x.to(vae.dtype) / config.scaling_factor).sample
        pixels = (frames.float().clamp(-1, 1) + 1) * 127.5
        return rearrange(pixels.round().to(torch.uint8), "b c f h w -> b f h w c")

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device


def load(settings: Model, device: torch.device) -> HunyuanVideo:
    """The policy of a folder in the diffusers layout, or of a hub id. The network is loaded in float32."""
    folder = _folder(settings.path)
    network = _read(HunyuanVideoTransformer3DModel, folder / "transformer", torch.float32)
    vae = _read(AutoencoderKLHunyuanVideo, folder / "vae", getattr(torch, settings.dtype))
    vae.requires_grad_(False).eval().to(device)
    if network.config.image_condition_type is not None or network.config.in_channels != network.config.out_channels:
        raise UserError(f"model.path={settings.path}: an image-to-video network; this family is text-to-video.")
    return HunyuanVideo(network.train().to(device), vae, folder, settings)


def _read(network: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network from its folder; one that is missing, damaged or of another class is a user's mistake."""
    try:
        return network.from_pretrained(folder, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        problem = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model.path: {folder} cannot be read ({problem}); download that folder again.") from None


def _folder(path: str) -> Path:
    """A local folder, or the local copy of a hub repository."""
    if not Path(path).is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"model.path={path}: no such folder; give a folder in the diffusers layout or a hub id.")
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path))
    parts = [f"{part}/config.json" for part in ("transformer", "vae", "text_encoder", "text_encoder_2")]
    parts += ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"]
    for part in ("model_index.json", *parts):
        if not (Path(path) / part).is_file():
            raise UserError(f"model.path={path}: {part} is missing; give a whole folder in the diffusers layout.")
    return Path(path)
