"""Wan 2.1 I2V 14 B, image-to-video: Wan with a reference image beside the noisy latent (Wan Team
2025, arXiv 2503.20314).

The network's input channels are the noisy latent's, a mask's and a given clip's latent. The clip is
the reference image and grey frames after it, encoded as a whole, so that the latent frames after
the first are not zero; the mask is one in the first latent frame. Each block also attends to the
image's states of CLIP-H, of the layer before the last, all places of them; it tells text from image
by counting 512 places for the text, so that a text has exactly as many. Both branches of
classifier-free guidance see the same image. The given clip's latent is the mode of the VAE's
posterior, and so no random number. All but this is `wan.py`.

Where an image has another shape than the clips, it is cut to it here, where diffusers' pipeline
stretches it; CLIP-H sees it as it is, by the folder's own processor, in both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from fastgrpo import models
from fastgrpo.core.config import Model, Video
from fastgrpo.core.policy import Condition, networks_of
from fastgrpo.models import wan, wan_i2v
from fastgrpo.models.loading import diffusers_folder
from fastgrpo.models.loading.wan_folder import Form
from fastgrpo.models.sizes.family_plan import FamilyPlan
from fastgrpo.models.sizes.transformer_blocks import Kept
from fastgrpo.models.sizes.units import IMAGE, SAMPLE, VIDEO, Attention
from fastgrpo.models.text_encoders.passes import InPasses
from fastgrpo.models.text_encoders.umt5 import TextEncoder
from fastgrpo.models.wan import Forward, Wan, blocks, share_sequence

__all__ = ["WanFromImage", "blocks", "encoder", "load", "share_sequence"]

NETWORK: str = models.declared("wan", "NETWORK")
PARTS = (*models.declared("wan", "PARTS"), "image_encoder", "image_processor")
MAX_TEXT_TOKENS: int = models.declared("wan", "MAX_TEXT_TOKENS")
PIPELINES = ("WanImageToVideoPipeline",)  # whose folders this family reads
READS_IMAGE = True
PUBLISHED = (
    (
        "",
        models.declared("wan", "LARGE")
        | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
)
IMAGE_PLACES = 257  # of CLIP-H: 16 x 16 patches and the class's
IMAGE_ENCODER = 0.631e9  # its parameters
# bytes per token and channel, as wan.KEPT, of blocks that attend to the image's states too
KEPT = {
    2: Kept((27.1, 0.0), (74.1, 12.0), (90.1, 12.0), 2.0, moved=(344.1, 0.0)),
    4: Kept((54.2, 0.0), (104.1, 24.0), (129.2, 24.0), 4.0),
}


class GivenClip(Wan):
    """Wan with a mask and a given clip's latent beside the noisy latent."""

    def _guided(
        self, x: Tensor, t: Tensor, condition: Condition, cfg: float, network: Forward
    ) -> Tensor:
        """A network's velocity with guidance of this scale, behind x the mask and the given clip.

        x: [B, C, F, H, W] float32;  t: [B];  returns like x
        """
        config: Any = next(iter(networks_of(self.network).values())).config
        given = condition["image"].to(x.dtype)  # [B, C, F, H, W]
        mask = x.new_zeros(len(x), config.in_channels - 2 * x.shape[1], *x.shape[2:])
        mask[:, :, 0] = 1
        return super()._guided(torch.cat([x, mask, given], 1), t, condition, cfg, network)


class WanFromImage(GivenClip):
    """The `fastgrpo.core.policy.Policy` of this family."""

    form: ClassVar[Form] = Form(
        models="Wan 2.1 I2V 14B, or model.family=wan_a14b_i2v for I2V-A14B",
        conditioned=True,
        images=True,
        places=MAX_TEXT_TOKENS,
    )


class GivenClipEncoder(wan_i2v.ImageTextEncoder):
    """An `Encoder`: UMT5's states, and the given clip's latent."""

    def __init__(self, texts: InPasses, vae: Any, video: Video) -> None:
        super().__init__(texts, vae, video)
        self.frames = video.frames

    def clip(self, frame: Tensor) -> Tensor:
        """The frame and grey ones, of value 0, after it.  returns [1, 3, F, H, W]"""
        return pad(frame, (0, 0, 0, 0, 0, self.frames - 1))


class ImageTextEncoder(GivenClipEncoder):
    """This family's `Encoder`: also CLIP-H's states."""

    family = "wan_i2v_14b"
    seen = ("image", "image_states")

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
        """Add the states.  picture: uint8 [H, W, 3]"""
        return {**super().of_picture(picture), "image_states": self.states(picture)}

    @torch.no_grad()
    def states(self, picture: Tensor) -> Tensor:
        """picture: uint8 [H, W, 3];  returns float32 [L, E] on the CPU"""
        seen = self.processor(images=Image.fromarray(picture.numpy()), return_tensors="pt")
        pixels = seen.pixel_values.to(self.vision.device, self.vision.dtype)
        states: Tensor = self.vision(pixels, output_hidden_states=True).hidden_states[-2]
        return states[0].float().cpu()


@contextmanager
def encoder(settings: Model, video: Video, device: torch.device) -> Iterator[ImageTextEncoder]:
    """The text encoder, the image encoder and the VAE of model.path; freed when the context ends.

    The last two are in float32, as the model's authors have them.
    """
    where = diffusers_folder.pipeline_folder(settings, PARTS)
    network = diffusers_folder.network_folder(settings, NETWORK)
    patch = diffusers_folder.read_json(network / "config.json")["patch_size"][-1]
    texts = TextEncoder(where, settings.torch_dtype, device, MAX_TEXT_TOKENS)
    with diffusers_folder.freed(texts):
        vae = diffusers_folder.read(AutoencoderKLWan, where / "vae", torch.float32)
        # a size that does not divide is refused before any image is encoded in it
        diffusers_folder.latent_size(
            video, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal, patch
        )
        vision = diffusers_folder.read(CLIPVisionModel, where / "image_encoder", torch.float32)
        vae, vision = (part.requires_grad_(False).eval().to(device) for part in (vae, vision))
        processor = CLIPImageProcessorPil.from_pretrained(where / "image_processor")
        with diffusers_folder.freed(
            ImageTextEncoder(texts, vae, video, vision, processor)
        ) as all_three:
            del vae, vision  # the encoder's are to be the last ones
            yield all_three


def load(settings: Model, device: torch.device) -> WanFromImage:
    """The policy of Wan 2.1 I2V's folder, or of its hub id; its network has no weights yet."""
    return wan.load_as(WanFromImage, settings, device)


def plan(config: Mapping[str, Any]) -> FamilyPlan:
    """Sizes of this family with a network of this config: Wan's, and the attention to the image."""
    texts: FamilyPlan = models.declared("wan", "sizes")(config, KEPT, times=SAMPLE)
    network, seen = texts.network, config["image_dim"]
    for block in network.blocks:
        for layer in ("add_k_proj", "add_v_proj"):
            block.linear(f"attn2.{layer}", config["added_kv_proj_dim"], network.width, IMAGE)
        block.norm("attn2.norm_added_k", network.width)
        block.attentions.append(Attention(width=network.width, queries=VIDEO, keys=IMAGE))
    embedder = "condition_embedder.image_embedder"
    network.rest.norm(f"{embedder}.norm1", seen, bias=True)
    network.rest.linear(f"{embedder}.ff.net.0.proj", seen, seen, IMAGE)
    network.rest.linear(f"{embedder}.ff.net.2", seen, network.width, IMAGE)
    network.rest.norm(f"{embedder}.norm2", network.width, bias=True)
    beside = replace(texts.auxiliary, encoders=texts.auxiliary.encoders + IMAGE_ENCODER)
    return replace(
        texts,
        network=replace(network, image=IMAGE_PLACES),
        auxiliary=beside,
        first_frame=True,
        given_clip=True,
        image_width=seen,
    )


def simulated(config: Mapping[str, Any], settings: Model) -> WanFromImage:
    """The policy around a network of this config, without VAE and times: for a simulated rank."""
    return wan.simulated_as(WanFromImage, config, settings)
