"""A prompt's text features and its reference image's latent, for families of image-to-video."""

import gc
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.core.config import Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Prompt
from fastgrpo.data import images
from fastgrpo.models.text_encoders.passes import InPasses, Pass


class ImageTextEncoder(InPasses):
    """An `Encoder`: a text encoder's features, and "image", the first frame's latent."""

    family: str  # for messages
    seen: tuple[str, ...] = ("image",)  # what the condition has of the image, by name

    def __init__(self, texts: InPasses, vae: Any, video: Video) -> None:
        self.texts = texts
        self.vae = vae
        self.size = (video.height, video.width)

    def passes(self) -> Sequence[Pass]:
        """The image's, then the texts'; the image of the unconditional branch is each prompt's own."""
        return (Pass((), self._images, self._free_vae, negative=lambda _: {}), *self.texts.passes())

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.texts.check(prompts)

    def joined(self, features: Condition) -> Condition:
        seen = {name: features[name] for name in self.seen if name in features}
        rest = {name: tensor for name, tensor in features.items() if name not in self.seen}
        return {**self.texts.joined(rest), **seen}

    def _images(self, prompts: Sequence[Prompt]) -> list[Condition]:
        """returns what `of_picture` gives, each"""
        return [self.of_picture(self._picture(prompt)) for prompt in prompts]

    def _free_vae(self) -> None:
        """Give back the VAE, which no text needs."""
        self.vae = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        return self.texts.cut(text)

    def _picture(self, prompt: Prompt) -> Tensor:
        """The reference image as it is, uint8 [H, W, 3].

        Raises UserError for none or an unreadable one.
        """
        if prompt.image is None:
            raise UserError(
                f"prompts: '{prompt.text}' has no reference image, which {self.family} needs; set "
                "prompts.image_column."
            )
        return images.read_image(prompt.image)

    def of_picture(self, picture: Tensor) -> Condition:
        """What the condition has of a reference image in its own size.  picture: uint8 [H, W, 3]"""
        return {"image": self.image(images.cover(picture, *self.size))}

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 [H, W, 3];  returns float32 [C, F, h, w] on the CPU, F = 1 for a frame"""
        frame = pixels.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        clip = self.clip(frame).to(self.vae.device, self.vae.dtype)
        return self.latent(self.vae.encode(clip).latent_dist, pixels)

    def clip(self, frame: Tensor) -> Tensor:
        """What is encoded of the first frame [1, 3, 1, H, W], -1 to 1: here itself alone."""
        return frame

    @abstractmethod
    def latent(self, posterior: Any, pixels: Tensor) -> Tensor:
        """What was encoded, as the network takes it, float32 [C, F, h, w] on the CPU.

        posterior: the VAE's, of a batch of one;  pixels: uint8 [H, W, 3]
        """
