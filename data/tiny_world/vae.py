"""The tiny VAE: clips float32 [B, 3, 9, 32, 32] in [-1, 1] <-> latents [B, 8, 3, 8, 8], std 1.

It is trained on clips of training meanings from random starts, batch by batch as they are drawn.
"""

import time
from collections.abc import Iterable

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from fastgrpo.data.tiny_world import shapes

CHANNELS = 8  # of a latent
BATCH = 8
# 2e-6 was no sharper after 1350 steps, and its latents were further from a Gaussian
KL_WEIGHT = 1e-4
RATE = 2e-3


def draw_clips(wanted: Iterable[shapes.Meaning], rng: np.random.Generator) -> Tensor:
    """One clip of each meaning, from a random start.  returns float32 [B, 3, F, H, W] in [-1, 1]"""
    clips = [shapes.draw(m, start=shapes.random_start(m, shapes.FRAMES, rng)) for m in wanted]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return pixels.float() / 127.5 - 1.0


def new_vae() -> AutoencoderKLHunyuanVideo:
    """An untrained VAE of 0.5 M parameters, 4x in space and in time."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=1.0,
    )


def vae_loss(
    vae: AutoencoderKLHunyuanVideo, x: Tensor, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss of the VAE and squared error per value, both scalars.

    Pixels off the background count five times: one pixel in eight is off.

    x: float32 [B, 3, F, H, W] in [-1, 1]
    """
    background = torch.tensor(shapes.BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1.0
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
    y = vae.decode(z).sample
    weight = 1.0 + 4.0 * ((x - background).abs().amax(1, keepdim=True) > 0.05)
    weighted = (weight * (y - x) ** 2).sum() / weight.expand_as(x).sum()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return weighted + 0.05 * (y - x).abs().mean() + KL_WEIGHT * kl, ((y - x) ** 2).mean()


def train_vae(vae: AutoencoderKLHunyuanVideo, steps: int, seed: int) -> None:
    """Train the VAE on clips of training meanings and sets its scaling_factor."""
    training, _ = shapes.meanings()
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    begun = time.monotonic()
    for step in range(1, steps + 1):
        x = draw_clips((training[rng.integers(len(training))] for _ in range(BATCH)), rng)
        loss, error = vae_loss(vae, x, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(
                f"vae step {step} of {steps}: mse {error.item():.5f}, "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    latents, _ = latents_of(vae, 256, np.random.default_rng([seed, 9]))
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())


@torch.no_grad()
def latents_of(
    vae: AutoencoderKLHunyuanVideo, count: int, rng: np.random.Generator
) -> tuple[Tensor, list[int]]:
    """Latents of clips of training meanings, and the index of each clip's meaning.

    returns float32 [count, C, F', H', W'], count indices
    """
    training, _ = shapes.meanings()
    which = [i % len(training) for i in range(count)]
    parts = []
    for first in range(0, count, 32):
        x = draw_clips((training[i] for i in which[first : first + 32]), rng)
        parts.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(parts), which
