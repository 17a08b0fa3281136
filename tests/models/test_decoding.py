"""What a decoder gives that is not finite is no black clip: it is marked, in every family."""

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastgrpo.core.config import Model, Video
from fastgrpo.models import known
from fastgrpo.models.loading import policies
from fastgrpo.models.loading.diffusers_folder import to_pixels

IMAGES = ("flux", "flux_2", "qwen_image", "stable_diffusion", "stable_diffusion_3", "z_image")
WANS = ("wan", "wan_a14b", "wan_a14b_i2v", "wan_i2v", "wan_i2v_14b")
VIDEOS = ("hunyuan_video", "hunyuan_video_15", "hunyuan_video_15_i2v", "skyreels_i2v", *WANS)


def test_a_clip_with_one_value_that_is_not_finite_is_marked() -> None:
    frames = torch.linspace(-1.5, 1.5, 4 * 3 * 2 * 4 * 4).reshape(4, 3, 2, 4, 4)
    clean = to_pixels(frames)
    frames[1, 2, 1, 3, 3], frames[2, 0, 0, 0, 0] = float("nan"), float("-inf")
    spoilt = to_pixels(frames)
    assert clean.finite.tolist() == [True] * 4 and spoilt.finite.tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert torch.equal(clean.pixels[[0, 3]], spoilt.pixels[[0, 3]])
    assert to_pixels(frames.bfloat16()).finite.tolist() == [True, False, False, True]


def test_every_family_is_tried_here() -> None:
    assert set(known()) == {*IMAGES, *VIDEOS}


@pytest.mark.parametrize("decode_batch", [None, 1])
@pytest.mark.parametrize("family", [*IMAGES, *VIDEOS])
def test_every_family_marks_the_clips_that_its_vae_spoils(
    family: str, decode_batch: int | None, tmp_path: Path
) -> None:
    """Finite latents: the decoder alone overflows, for one clip of three."""
    importlib.import_module(f"tests.harness.folders.{family}").write(tmp_path / "model")
    settings = Model(family=family, path=str(tmp_path / "model"), decode_batch=decode_batch)
    policy = policies.load(settings, torch.device("cpu"))
    video = Video(frames=1 if family in IMAGES else 5, height=32, width=32)
    latents = torch.randn(
        3, *policy.latent_shape(video), generator=torch.Generator().manual_seed(0)
    )
    latents[1] += 1e4  # by which the planted fault knows the clip
    vae: Any = policy.vae
    decode = vae.decode

    def overflowing(z: torch.Tensor) -> Any:
        output = decode(z)
        output.sample[z.flatten(1).mean(1) > 100, 0] = float("inf")
        return output

    about = {"image": torch.zeros_like(latents[:, :, :1])}  # which image-to-video alone asks for
    whole = policy.decode(latents, about)
    with mock.patch.object(vae, "decode", overflowing):
        decoded = policy.decode(latents, about)
    assert whole.finite.tolist() == [True, True, True]
    assert decoded.finite.tolist() == [True, False, True]
    assert torch.equal(decoded.pixels[[0, 2]], whole.pixels[[0, 2]])
