"""SkyReels-V1, image-to-video: HunyuanVideo with a reference image (Skywork AI 2025,
SkyReels-V1-Hunyuan-I2V).

The network's input channels are the noisy latent and, after it, the reference image's: its latent
in the first frame, zeros in the others. The image is encoded once per prompt; as in diffusers'
pipeline its latent is sampled from the VAE's posterior, but with noise that is a function of the
pixels, so that a rollout, its update and a resumed run all see the same one. Both branches of
classifier-free guidance see the same image. All but the network is HunyuanVideo's: `model.path` is
its folder, and `model.network` SkyReels'.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo import models
from fastgrpo.algorithm import noise
from fastgrpo.core.config import Model, Video
from fastgrpo.core.policy import Condition
from fastgrpo.models import hunyuan_video
from fastgrpo.models.hunyuan_video import PARTS, HunyuanVideo, blocks, share_sequence
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.text_encoders import first_frame

__all__ = ["SkyReels", "blocks", "encoder", "load", "share_sequence"]

NETWORK: str = models.declared("hunyuan_video", "NETWORK")
MAX_TEXT_TOKENS: int = models.declared("hunyuan_video", "MAX_TEXT_TOKENS")
MAX_CLIP_TOKENS: int = models.declared("hunyuan_video", "MAX_CLIP_TOKENS")
# of an export; the folder of the other parts names HunyuanVideo's
PIPELINE = "HunyuanSkyreelsImageToVideoPipeline"
# whose folders this family reads
PIPELINES = (
    PIPELINE,
    *models.declared("hunyuan_video", "PIPELINES"),
)
READS_IMAGE = True
GUIDANCE_TIMES_1000: bool = models.declared("hunyuan_video", "GUIDANCE_TIMES_1000")
USUAL_GUIDANCE = 1.0  # the embedded one: what follows the text is model.cfg
PUBLISHED = tuple(
    (part, of | {"in_channels": 32}) for part, of in models.declared("hunyuan_video", "PUBLISHED")
)


class SkyReels(HunyuanVideo):
    """The `fastgrpo.core.policy.Policy` of this family."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity, see `Policy`.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        first = condition["image"].to(x.dtype)  # [B, C, 1, H, W]
        return super().velocity(
            torch.cat([x, pad(first, (0, 0, 0, 0, 0, x.shape[2] - 1))], 1), t, condition
        )


class ImageTextEncoder(first_frame.ImageTextEncoder):
    """This family's `Encoder`: HunyuanVideo's text features, and the reference image's latent."""

    family = "skyreels_i2v"

    def latent(self, posterior: Any, pixels: Tensor) -> Tensor:
        """A sample of the posterior, scaled.

        pixels: uint8 [H, W, 3];  returns float32 [C, 1, h, w] on the CPU
        """
        mean, std = posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()
        (draw,) = noise.normal([posterior_key(pixels)], tuple(mean.shape))
        latent: Tensor = (mean + std * draw) * self.vae.config.scaling_factor
        return latent


def posterior_key(pixels: Tensor) -> noise.Key:
    """What the noise of an image's latent is a function of.  pixels: uint8 [H, W, 3]"""
    return (
        "reference image",
        *pixels.shape,
        hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(),
    )


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[ImageTextEncoder]:
    """The text encoders and the VAE of model.path; freed when the context ends."""
    where, dtype = diffusers_folder.pipeline_folder(settings, PARTS), settings.torch_dtype
    with diffusers_folder.freed(hunyuan_video.text_encoder(where, dtype, device)) as texts:
        patch = hunyuan_video.check_network(settings, where, images=True)["patch_size"]
        vae = diffusers_folder.read(AutoencoderKLHunyuanVideo, where / "vae", dtype)
        # a size that the VAE would round is refused before any image is encoded in it
        config = vae.config
        diffusers_folder.latent_size(
            video, config.spatial_compression_ratio, config.temporal_compression_ratio, patch
        )
        vae = vae.requires_grad_(False).eval().to(device)
        with diffusers_folder.freed(ImageTextEncoder(texts, vae, video)) as both:
            del vae, config  # the encoder's is to be the last one
            yield both


def load(settings: Model, device: torch.device) -> SkyReels:
    """The policy of HunyuanVideo's folder and SkyReels' network, which has no weights yet."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    shift = diffusers_folder.constant_shift(where)
    hunyuan_video.check_network(settings, where, images=True)
    network, vae = hunyuan_video.load_networks(settings, where, device)
    guidance = USUAL_GUIDANCE if settings.guidance is None else settings.guidance
    return SkyReels(network, vae, shift, settings, guidance)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config: HunyuanVideo's, and a reference image."""
    texts: FamilyPlan = models.declared("hunyuan_video", "plan")(config)
    return replace(texts, first_frame=True)


def simulated(config: Mapping[str, Any], settings: Model) -> SkyReels:
    """The policy around a network of this config, without a VAE: all that a simulated rank runs."""
    network = HunyuanVideoTransformer3DModel(**config).train()
    return SkyReels(network, vae=nn.Module(), shift=1.0, settings=settings, guidance=1.0)
