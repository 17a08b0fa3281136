"""What a family's function plan(config) gives: sizes of its network and of the models beside it."""

from dataclasses import dataclass

from fastgrpo.models.sizes.text_encoders import Published
from fastgrpo.models.sizes.units import Network, Shape


@dataclass(frozen=True, kw_only=True)
class AuxiliaryModels:
    """The published VAE and text encoders of a family, and what decoding costs.

    Bytes and FLOPs of decoding: `python -m benchmarks.plan.check --calibrate`.
    """

    space: int  # pixels per latent place and side
    time: int  # frames per latent frame
    channels: int  # of the latent
    text: int  # tokens of the longest text
    encoders: float  # parameters of the text encoders' files
    texts: tuple[Published, ...] = ()
    """The text encoders, each as it is placed on a GPU; empty: all as one, whole."""
    vae: float  # parameters of the VAE
    vae_width: int = 128  # first of its block_out_channels, or its base_dim
    vae_bytes: int = 0  # of each of its numbers; 0: as many as in compute precision
    decode_flops: float  # per pixel that a tile covers
    decode_bytes: float  # per pixel of a tile at work, in bfloat16
    graph_bytes: float = 0.0
    """Per pixel that a tile covers, in bfloat16: what a decode with a gradient keeps for its
    backward. 0: not counted."""
    tile: tuple[int, int, int] | None = None  # frames, height, width; None: the whole clip
    stride: tuple[int, int, int] = (1, 1, 1)
    uncut_frames: int = 0
    """The most frames that are not cut in time, where a tile has more than those; 0: a tile's."""
    trimmed: bool = False  # whether a text keeps its own length; else all are padded to `text`


@dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """A family with a network of some config."""

    network: Network
    patch: int  # latent places per token and side
    auxiliary: AuxiliaryModels
    text_width: int  # channels of the text features that the network takes
    pooled_width: int = 0  # channels of the pooled text; 0: the network takes none
    glyph_width: int = 0
    """Channels of the features of quoted text, of which a usual prompt has none; 0: none at all."""
    first_frame: bool = False  # whether a reference image's latent is a part of the condition
    given_clip: bool = False  # whether that latent has all of a clip's frames, not the first alone
    image_width: int = 0  # channels of the reference image's states; 0: the network takes none
    given_frames: int = 0  # latent frames of a clip that the condition gives and that are not drawn

    def condition(self, text: int, latent: tuple[int, int, int, int]) -> dict[str, Shape]:
        """Shapes of one prompt's condition.  text: tokens;  latent: (C, F, H, W)"""
        shapes: dict[str, Shape] = {"text": (text, self.text_width)}
        if self.pooled_width:
            shapes["pooled"] = (self.pooled_width,)
        if self.glyph_width:
            shapes["glyphs"] = (0, self.glyph_width)
        if self.first_frame:
            channels, frames, height, width = latent
            shapes["image"] = (channels, frames if self.given_clip else 1, height, width)
        if self.image_width:
            shapes["image_states"] = (self.network.image, self.image_width)
        return shapes
