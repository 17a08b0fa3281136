"""HunyuanVideo-1.5, image-to-video (Tencent Hunyuan 2025, arXiv 2511.18870).

The network's input channels are the noisy latent's, a given latent's and a mask's. The given latent
is the reference image's in the first frame and zeros after it, of which the mask is one in the
first frame. SigLIP's states of the image, of its last layer, stand before the text's tokens. Both
branches of classifier-free guidance see the same image. Its latent is the mode of the VAE's
posterior, and so no random number. All frames are drawn. All but this is `hunyuan_video_15.py`.

The image is cut to the clips' shape, for SigLIP as well; diffusers' pipeline chooses a shape of its
own by the image's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from fastgrpo import models
from fastgrpo.core.config import Model, Video
from fastgrpo.core.policy import Condition
from fastgrpo.data import images
from fastgrpo.models import hunyuan_video_15
from fastgrpo.models.hunyuan_video_15 import (
    HunyuanVideo15,
    HunyuanVideo15Transformer3DModel,
    blocks,
    share_sequence,
)
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.text_encoders import first_frame
from fastgrpo.models.text_encoders.passes import InPasses
from fastgrpo.models.text_encoders.qwen_and_byt5 import TextEncoder

__all__ = ["HunyuanVideo15FromImage", "blocks", "encoder", "load", "share_sequence"]

NETWORK: str = models.declared("hunyuan_video_15", "NETWORK")
PARTS = (*models.declared("hunyuan_video_15", "PARTS"), "image_encoder", "feature_extractor")
PIPELINES = ("HunyuanVideo15ImageToVideoPipeline",)  # whose folders this family reads
MAX_TEXT_TOKENS: int = models.declared("hunyuan_video_15", "MAX_TEXT_TOKENS")
MAX_GLYPH_TOKENS: int = models.declared("hunyuan_video_15", "MAX_GLYPH_TOKENS")
READS_IMAGE = True
PUBLISHED = models.declared("hunyuan_video_15", "PUBLISHED")
IMAGE_PLACES = 729  # of SigLIP: 27 x 27 patches of 14 pixels
IMAGE_ENCODER = 0.428e9  # its parameters


class HunyuanVideo15FromImage(HunyuanVideo15):
    """The `fastgrpo.core.policy.Policy` of this family."""

    sees_image: ClassVar[bool] = True

    def _given(self, x: Tensor, texts: Sequence[Condition]) -> Tensor:
        """The noisy latent, the image's, and its mask.

        x: [B, C, F, H, W];  returns [B, 2 C + 1, F, H, W]
        """
        image = torch.cat([part["image"] for part in texts]).to(x.dtype)  # [B, C, 1, H, W]
        first = torch.cat([image, torch.ones_like(image[:, :1])], 1)
        return torch.cat([x, pad(first, (0, 0, 0, 0, 0, x.shape[2] - 1))], 1)


class ImageTextEncoder(first_frame.ImageTextEncoder):
    """This family's `Encoder`: the texts' states, the image's latent, and SigLIP's states."""

    family = "hunyuan_video_15_i2v"
    seen: tuple[str, ...] = models.declared("hunyuan_video_15", "SEEN")

    def __init__(
        self, texts: InPasses, vae: Any, video: Video, vision: Any, processor: Any
    ) -> None:
        """vision, processor: the image encoder and what makes its pixels of a picture"""
        super().__init__(texts, vae, video)
        self.vision = vision
        self.processor = processor

    def _free_vae(self) -> None:
        """Give back the image encoder, too."""
        self.vision = None
        super()._free_vae()

    def of_picture(self, picture: Tensor) -> Condition:
        """Latent and states.  picture: uint8 [H, W, 3]"""
        pixels = images.cover(picture, *self.size)
        return {"image": self.image(pixels), "image_states": self.states(pixels)}

    @torch.no_grad()
    def states(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 [H, W, 3];  returns float32 [I, K] on the CPU"""
        seen = self.processor(images=Image.fromarray(pixels.numpy()), return_tensors="pt")
        given = seen.pixel_values.to(self.vision.device, self.vision.dtype)
        states: Tensor = self.vision(given).last_hidden_state
        return states[0].float().cpu()

    def latent(self, posterior: Any, pixels: Tensor) -> Tensor:
        """The posterior's mode, scaled.

        pixels: uint8 [H, W, 3];  returns float32 [C, 1, h, w] on the CPU
        """
        latent: Tensor = posterior.mode()[0].float().cpu() * self.vae.config.scaling_factor
        return latent


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[ImageTextEncoder]:
    """The text encoders, the image encoder and the VAE of model.path; freed when the context ends.

    The last two are in the compute precision, as the pipeline has them.
    """
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    dtype = settings.torch_dtype
    texts = TextEncoder(where, dtype, device, (MAX_TEXT_TOKENS, MAX_GLYPH_TOKENS))
    with diffusers_folder.freed(texts):
        vae = diffusers_folder.read(AutoencoderKLHunyuanVideo15, where / "vae", dtype)
        # a size that does not divide is refused before any image is encoded in it
        space, time = vae.config.spatial_compression_ratio, vae.config.temporal_compression_ratio
        diffusers_folder.latent_size(video, space, time, 1)
        vision = diffusers_folder.read(SiglipVisionModel, where / "image_encoder", dtype)
        vae, vision = (part.requires_grad_(False).eval().to(device) for part in (vae, vision))
        processor = SiglipImageProcessorPil.from_pretrained(where / "feature_extractor")
        with diffusers_folder.freed(
            ImageTextEncoder(texts, vae, video, vision, processor)
        ) as all_of_them:
            del vae, vision  # the encoder's are to be the last ones
            yield all_of_them


def load(settings: Model, device: torch.device) -> HunyuanVideo15FromImage:
    """The policy of HunyuanVideo-1.5's image-to-video folder, or of its hub id; its network has no
    weights yet.
    """
    return hunyuan_video_15.load_as(HunyuanVideo15FromImage, settings, device, PARTS)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config: those from text, and the image's."""
    texts: FamilyPlan = models.declared("hunyuan_video_15", "plan")(config)
    beside = replace(texts.auxiliary, encoders=texts.auxiliary.encoders + IMAGE_ENCODER)
    return replace(
        texts,
        network=replace(texts.network, image=IMAGE_PLACES, image_joins=True),
        auxiliary=beside,
        first_frame=True,
        image_width=config["image_embed_dim"],
    )


def simulated(config: Mapping[str, Any], settings: Model) -> HunyuanVideo15FromImage:
    """The policy around a network of this config, without a VAE: all that a simulated rank runs."""
    network = HunyuanVideo15Transformer3DModel(**config).train()
    return HunyuanVideo15FromImage(network, nn.Module(), shift=1.0, rescale=0.0, settings=settings)
