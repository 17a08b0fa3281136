"""What a VAE's decoder computes and holds per pixel, by running it without contents.

FakeTensorMode on the CPU, diffusers' classes of the published sizes, bfloat16, PyTorch's own
kernels: a GPU's convolutions take a workspace besides. FLOPs are those of convolutions, matrix
products and attention.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fastgrpo.models.sizes.family_plan import AuxiliaryModels
from fastgrpo.tools.plan.simulation.counters import counting_flops
from fastgrpo.tools.plan.subject import family_plan, published


def _image(latent_channels: int, quantised: bool) -> Any:
    """The VAE of FLUX or of Stable Diffusion."""
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
    )


def _hunyuan() -> Any:
    vae = AutoencoderKLHunyuanVideo()
    vae.use_framewise_decoding = False  # what is decoded here is one of its tiles
    return vae


def _wan_2_2() -> Any:
    """The VAE of TI2V-5B: patches of 2 x 2 pixels, levels that add what they shrink or grow."""
    return AutoencoderKLWan(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )


IMAGES = (AutoencoderKL, AutoencoderKLFlux2)
"""Whose latents have no frames."""
Pixels = tuple[int, int, int]
DECODERS: dict[
    str, tuple[Callable[[], Any], Pixels]
] = {  # by a family and what a hub id has in it: (frames, height, width) of a clip to decode
    "hunyuan_video": (_hunyuan, (17, 256, 256)),
    "hunyuan_video_15": (AutoencoderKLHunyuanVideo15, (33, 256, 256)),
    "flux_2": (AutoencoderKLFlux2, (1, 512, 512)),
    "flux": (lambda: _image(16, quantised=False), (1, 720, 720)),
    "wan": (AutoencoderKLWan, (9, 480, 832)),
    "qwen_image": (AutoencoderKLQwenImage, (1, 512, 512)),
    "wan ti2v-5b": (_wan_2_2, (9, 480, 832)),
    "stable_diffusion": (lambda: _image(4, quantised=True), (1, 512, 512)),
}


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside have at once.

    MemTracker takes no module that is called twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most, self.known = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage()) not in self.known
            ):
                self.known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def costs(name: str, size: Pixels) -> tuple[float, float]:
    """(FLOPs, bytes at the peak beyond weights and latent) of decoding one clip.

    size: frames, height, width
    """
    facts, (frames, height, width) = planned(name), size
    latent = [
        facts.channels,
        (frames - 1) // facts.time + 1,
        height // facts.space,
        width // facts.space,
    ]
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        vae = DECODERS[name][0]()
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        z = torch.zeros(1, *latent, dtype=torch.bfloat16)
        z = z.squeeze(2) if isinstance(vae, IMAGES) else z
        with counting_flops() as flops:
            vae.decode(z)
        with Held() as held:  # a pass of its own, as in a simulation
            vae.decode(z)
    return float(flops.get_total_flops()), float(held.most)


def graph_per_pixel(name: str) -> float:
    """Bytes per pixel that a decode with a gradient in its latent keeps for the backward.

    name: of DECODERS
    """
    facts, (frames, height, width) = planned(name), DECODERS[name][1]
    places = [(frames - 1) // facts.time + 1, height // facts.space, width // facts.space]
    kept: dict[Any, int] = {}
    with FakeTensorMode(), torch.device("cpu"):
        vae = DECODERS[name][0]()
        vae.requires_grad_(False)
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        weights = {parameter.untyped_storage() for parameter in vae.parameters()}
        z = torch.zeros(1, facts.channels, *places, dtype=torch.bfloat16)
        z = (z.squeeze(2) if isinstance(vae, IMAGES) else z).requires_grad_()

        def keep(tensor: Tensor) -> Tensor:
            """Count a saved tensor [...] whose memory is not counted yet and no weight's."""
            storage = tensor.untyped_storage()
            if storage not in weights:
                kept[storage] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            vae.decode(z)
    return sum(kept.values()) / (frames * height * width)


def planned(name: str) -> AuxiliaryModels:
    """What the family's plan says of its VAE.  name: of DECODERS"""
    family, _, named = name.partition(" ")
    return family_plan(family, published(family, named)).auxiliary


def per_pixel(name: str) -> tuple[float, float]:
    """(FLOPs, bytes) per pixel of what is decoded at once: a tile, an image, of Wan the frames of
    one latent frame.
    """
    facts, (_, size) = planned(name), DECODERS[name]
    flops, held = costs(name, size)
    if not name.startswith("wan"):
        return flops / math.prod(size), held / math.prod(size)
    frames, height, width = size
    shorter, _ = costs(name, (frames - facts.time, height, width))
    pixels = facts.time * height * width
    return (flops - shorter) / pixels, held / pixels


def calibrate() -> None:
    """Print both of each family beside the plan's."""
    for name in DECODERS:
        (flops, held), facts = per_pixel(name), planned(name)
        print(
            f"bfloat16  {name:<17} decoding, per pixel: {flops / 1e6:.1f} MFLOP (plan "
            f"{facts.decode_flops / 1e6:.1f})"
            f", {held:,.0f} bytes (plan {facts.decode_bytes:,.0f}), with a gradient "
            f"{graph_per_pixel(name):,.0f} (plan {facts.graph_bytes:,.0f})",
            flush=True,
        )
