"""Wan 2.2 A14B, image-to-video: the two networks of `wan_a14b.py`, with a mask and a given clip's
latent beside the noisy latent as in `wan_i2v_14b.py` (Wan Team 2025, arXiv 2503.20314, and the
release of Wan 2.2).

There is no image encoder: the networks see the reference image by the given clip alone. The
folder's boundary between them is 0.9, from text 0.875. The authors sample with a shift of 5, where
the folder's scheduler has another: a recipe sets rollout.shift.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan

from fastgrpo import models
from fastgrpo.core.config import Model, Video
from fastgrpo.models import wan
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.loading.wan_folder import Form
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.wan_a14b import WanExperts, blocks, share_sequence
from fastgrpo.models.wan_i2v_14b import GivenClip, GivenClipEncoder

__all__ = ["WanExpertsFromImage", "blocks", "encoder", "load", "share_sequence"]

NETWORKS: tuple[str, str] = models.declared("wan_a14b", "NETWORKS")
NETWORK = NETWORKS[0]
PARTS: tuple[str, ...] = models.declared("wan_a14b", "PARTS")
MAX_TEXT_TOKENS: int = models.declared("wan", "MAX_TEXT_TOKENS")
PIPELINES = ("WanImageToVideoPipeline",)  # whose folders this family reads
READS_IMAGE = True
PUBLISHED = (("", models.declared("wan", "LARGE") | {"in_channels": 36}),)
BOUNDARY = 0.9  # of the published folder, for a simulated rank


class WanExpertsFromImage(GivenClip, WanExperts):
    """The `fastgrpo.core.policy.Policy` of this family."""

    form: ClassVar[Form] = Form(
        models="Wan 2.2 I2V-A14B, or model.family=wan_i2v_14b for Wan 2.1 I2V",
        experts=True,
        conditioned=True,
    )


class ImageTextEncoder(GivenClipEncoder):
    """This family's `Encoder`: UMT5's states, and the given clip's latent."""

    family = "wan_a14b_i2v"


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[ImageTextEncoder]:
    """The text encoder and the VAE of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    patch = diffusers_folder.read_json(where / NETWORK / "config.json")["patch_size"][-1]
    with wan.encoder(settings, video, device) as texts:
        vae = diffusers_folder.read(AutoencoderKLWan, where / "vae", torch.float32)
        # a size that does not divide is refused before any image is encoded in it
        diffusers_folder.latent_size(
            video, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal, patch
        )
        vae = vae.requires_grad_(False).eval().to(device)
        with diffusers_folder.freed(ImageTextEncoder(texts, vae, video)) as both:
            del vae  # the encoder's is to be the last one
            yield both


def load(settings: Model, device: torch.device) -> WanExpertsFromImage:
    """The policy of Wan 2.2 I2V-A14B's folder, or of its hub id; its networks have no weights yet."""
    return wan.load_as(WanExpertsFromImage, settings, device)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with two networks of this config: those from text, and a given clip."""
    texts: FamilyPlan = models.declared("wan_a14b", "plan")(config)
    return replace(texts, first_frame=True, given_clip=True)


def simulated(config: Mapping[str, Any], settings: Model) -> WanExpertsFromImage:
    """The policy around two networks of this config, without VAE and times."""
    return wan.simulated_as(WanExpertsFromImage, config, settings)
