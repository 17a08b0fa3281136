"""A prompt's text features and its reference image's latent, for families of image-to-video."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.core.config import Video
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Encoder, Prompt
from fastgrpo.data import images


class ImageTextEncoder(ABC):
    """An `Encoder`: a text encoder's features, and "image", the first frame's latent."""

    family: str  # for messages

    def __init__(self, texts: Encoder, vae: Any, video: Video) -> None:
        self.texts = texts
        self.vae = vae
        self.size = (video.height, video.width)

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        seen = [self.of_picture(self._picture(prompt)) for prompt in prompts]
        texts = self.texts(prompts)
        return [{**text, **picture} for text, picture in zip(texts, seen, strict=True)]

    def negative(self, text: str) -> Condition:
        """Text alone: the image of the unconditional branch is each prompt's own."""
        return self.texts.negative(text)

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
