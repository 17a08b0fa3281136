"""Pixels to latents by a family's VAE: the inverse of `Policy.frames`, for clips that are given."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from fastgrpo.core.policy import Policy


@torch.no_grad()
def encode_pixels(policy: Policy, pixels: Tensor) -> Tensor:
    """The mode of each clip's latent, normalised as the family's network takes it.

    By the VAE's own config: latents_mean and latents_std (Wan), else shift_factor and
    scaling_factor. One clip at a time.

    pixels: uint8 [B, F, H, W, 3];  returns float32 [B, C, F', H', W'], on the VAE's device
    """
    vae: Any = policy.vae
    latents = []
    for clip in pixels.split(1):
        frames = rearrange(clip.to(vae.device), "b f h w c -> b c f h w").float() / 127.5 - 1
        frames = frames.to(vae.dtype)
        if isinstance(vae, AutoencoderKL):  # of images: without time
            latents.append(vae.encode(frames.squeeze(2)).latent_dist.mode().unsqueeze(2))
        else:
            latents.append(vae.encode(frames).latent_dist.mode())
    return _normalised(torch.cat(latents).float(), vae.config)


def _normalised(latents: Tensor, config: Any) -> Tensor:
    """Latents [B, C, F, H, W] by the VAE's config.  returns like them"""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        both = torch.tensor([mean, std], device=latents.device).reshape(2, 1, -1, 1, 1, 1)
        return (latents - both[0]) / both[1]
    return (latents - (config.get("shift_factor") or 0.0)) * config.get("scaling_factor")
