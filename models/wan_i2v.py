"""Wan 2.2 TI2V-5B, image-to-video: a clip whose first latent frame is the reference image's.

A state, [B, C, F - 1, H, W], is what is drawn of a clip: the latent frames behind the image's,
which therefore gets no noise, takes no step and counts in no log-probability. The network sees the
whole clip, the image's latent in front, whose tokens it is told time 0 and all others t; what it
predicts for them is dropped. Both branches of classifier-free guidance see the same image. Its
latent is the mode of the VAE's posterior, and so no random number. All but this is `wan.py`.

Where an image has another shape than the clips, it is cut to it here, where diffusers' pipeline
stretches it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fastgrpo import models
from fastgrpo.core.config import Model, Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition
from fastgrpo.models import wan
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.sizes.transformer_blocks import Kept
from fastgrpo.models.sizes.units import VIDEO
from fastgrpo.models.text_encoders import first_frame
from fastgrpo.models.wan import PARTS, Wan, blocks
from fastgrpo.parallel.sequence_parallel import Layout

__all__ = ["WanImageToVideo", "blocks", "encoder", "load", "share_sequence"]

NETWORK: str = models.declared("wan", "NETWORK")
MAX_TEXT_TOKENS: int = models.declared("wan", "MAX_TEXT_TOKENS")
PIPELINE = "WanImageToVideoPipeline"  # of an export; the folder names the one of text-to-video
PIPELINES = (*models.declared("wan", "PIPELINES"), PIPELINE)  # whose folders this family reads
READS_IMAGE = True
PUBLISHED = (("", models.declared("wan", "TI2V_5B")),)
# bytes per token and channel, as wan.KEPT, of blocks whose modulation has a row for each token;
# in the first and the third pair also the modulation itself and what the time embedder keeps: of
# that 4 more in bfloat16 than was measured, since both its layers' results are float32
KEPT = {
    2: Kept((64.0, 0.0), (102.1, 12.0), (144.1, 12.0), 2.0, moved=(458.1, 0.0)),
    4: Kept((104.0, 0.0), (128.1, 24.0), (200.1, 24.0), 4.0),
}


class WanImageToVideo(Wan):
    """The `fastgrpo.core.policy.Policy` of this family."""

    def latent_shape(self, video: Video) -> tuple[int, ...]:
        channels, frames, height, width = super().latent_shape(video)
        if frames == 1:
            raise UserError(
                f"video.frames={video.frames}: the first frame is the reference image, so that "
                f"none is left to draw; use {1 + self.vae.config.scale_factor_temporal} or more."
            )
        return channels, frames - 1, height, width

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity of the frames behind the image, see `Policy`.

        x: [B, C, F - 1, H, W] float32;  t: [B];  returns like x
        """
        return super().velocity(whole_clip(x, condition), t, condition)[:, :, 1:]

    def _times(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's times of a whole clip x [B, C, F, H, W], one for each token, row by row.

        t: [B];  returns [B, N]
        """
        config: Any = self.network.config
        patch = config.patch_size[-1]
        tokens = (x.shape[3] // patch) * (x.shape[4] // patch)  # of a frame
        drawn = t[:, None].expand(-1, (x.shape[2] - 1) * tokens)
        return torch.cat([t.new_zeros(len(t), tokens), drawn], 1)

    def frames(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, F - 1, H, W] float32 to the VAE's frames [B, 3, F, H, W]."""
        return super().frames(whole_clip(x, condition), condition)


def whole_clip(x: Tensor, condition: Condition) -> Tensor:
    """The image's latent and what is drawn.  x: [B, C, F - 1, H, W];  returns [B, C, F, H, W]"""
    return torch.cat([condition["image"].to(x.dtype), x], 2)


class ImageTextEncoder(first_frame.ImageTextEncoder):
    """This family's `Encoder`: UMT5's states, and the reference image's latent."""

    family = "wan_i2v"

    def latent(self, posterior: Any, pixels: Tensor) -> Tensor:
        """The posterior's mode, normalised channel by channel.

        pixels: uint8 [H, W, 3];  returns float32 [C, F, h, w] on the CPU, F = 1 for a frame
        """
        mean, std = (
            torch.tensor(values).reshape(-1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        latent: Tensor = (posterior.mode()[0].float().cpu() - mean) / std
        return latent


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[ImageTextEncoder]:
    """The text encoder and the VAE of model.path; freed when the context ends."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    network = diffusers_folder.network_folder(settings, NETWORK)
    patch = diffusers_folder.read_json(network / "config.json")["patch_size"][-1]
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


def load(settings: Model, device: torch.device) -> WanImageToVideo:
    """The policy of Wan 2.2 TI2V-5B's folder, or of its hub id; its network has no weights yet."""
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    if not diffusers_folder.read_json(where / "model_index.json").get("expand_timesteps"):
        raise UserError(
            f"model.path={settings.path}: model_index.json has no expand_timesteps: this network "
            "was not trained with a time for each token; use Wan 2.2 TI2V-5B, or for Wan 2.1 I2V "
            "model.family=wan_i2v_14b, for I2V-A14B wan_a14b_i2v."
        )
    return wan.load_as(WanImageToVideo, settings, device)


def share_sequence(network: Any, layout: Layout) -> None:
    """Let the ranks of a group share each sequence: see `fastgrpo.parallel.sequence_parallel`."""
    wan.share_sequence(network, layout)

    def split_times(embedded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[B, N, D] and [B, N, 6 D] to [B, n, D] and [B, n, 6 D]; the text stays whole"""
        part = layout.sp.part(layout.video)
        time, modulation, *rest = embedded
        return (*(of[:, part.start : part.stop] for of in (time, modulation)), *rest)

    layout.after(network.condition_embedder, split_times)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config: Wan's, and a reference image."""
    texts: FamilyPlan = models.declared("wan", "sizes")(config, KEPT, times=VIDEO)
    return replace(texts, first_frame=True, given_frames=1)


def simulated(config: Mapping[str, Any], settings: Model) -> WanImageToVideo:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    return wan.simulated_as(WanImageToVideo, config, settings)
