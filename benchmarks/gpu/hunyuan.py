"""HunyuanVideo's network and its blocks with random weights, by any diffusers that has them."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

PUBLISHED: Mapping[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_axes_dim": (16, 56, 56),
}
SMALL = {
    **PUBLISHED,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "rope_axes_dim": (4, 14, 14),
    "num_layers": 2,
    "num_single_layers": 4,
    "text_embed_dim": 128,
}
LATENT, TEXT = (14, 60, 60), 256  # 53 frames of 480 x 480: 12,600 tokens; tokens of the text
SMALL_LATENT, SMALL_TEXT = (3, 16, 16), 16
DUAL, SINGLE = 20, 40  # blocks of the published network


@dataclass(frozen=True)
class Size:
    """A network's config, and what goes into it."""

    config: Mapping[str, Any]
    latent: tuple[int, int, int]  # (F, H, W)
    text: int

    @property
    def width(self) -> int:
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def tokens(self) -> int:
        """Tokens of video and text."""
        frames, height, width = self.latent
        return frames * height * width // 4 + self.text

    @property
    def block_flops(self) -> tuple[float, float]:
        """FLOPs of a sample's forward of a block of either kind: products and attention."""
        return 24.0 * self.tokens * self.width**2, 4.0 * self.tokens**2 * self.width


def size(small: bool, **changed: Any) -> Size:
    """The published size, or a small one.  changed: of the config"""
    config = SMALL if small else PUBLISHED
    latent, text = (SMALL_LATENT, SMALL_TEXT) if small else (LATENT, TEXT)
    return Size({**config, **changed}, latent, text)


def network(of: Size, where: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The network with random weights, made without memory and then put on the device."""
    from diffusers import HunyuanVideoTransformer3DModel

    known = inspect.signature(HunyuanVideoTransformer3DModel.__init__).parameters
    with torch.device("meta"):
        made = HunyuanVideoTransformer3DModel(**{k: v for k, v in of.config.items() if k in known})
    nn.Module.to(made, dtype)
    return randomize(made.to_empty(device=where))


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter random values, and every buffer zeros, in place."""
    for parameter in module.parameters():
        parameter.normal_(std=0.02 if parameter.ndim > 1 else 0.0).add_(float(parameter.ndim == 1))
    for buffer in module.buffers():
        buffer.zero_()
    return module


def inputs(of: Size, batch: int, where: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the network's forward takes: latents [B, 16, F, H, W], whole texts [B, L, D], ..."""
    make: Any = {"device": where, "dtype": dtype}
    return {
        "hidden_states": torch.randn(batch, 16, *of.latent, **make),
        "timestep": torch.full((batch,), 500.0, device=where),
        "encoder_hidden_states": torch.randn(batch, of.text, of.config["text_embed_dim"], **make),
        "encoder_attention_mask": torch.ones(batch, of.text, dtype=torch.bool, device=where),
        "pooled_projections": torch.randn(batch, of.config["pooled_projection_dim"], **make),
        "guidance": torch.full((batch,), 6000.0, device=where),
        "return_dict": False,
    }


def blocks(network: Any) -> list[nn.Module]:
    """The dual-stream blocks, then the single-stream ones."""
    return [*network.transformer_blocks, *network.single_transformer_blocks]


def drop_masks(network: Any) -> None:
    """Let the blocks attend without a mask, as fastgrpo does, so that flash kernels apply."""
    for block in blocks(network):
        block.register_forward_pre_hook(
            lambda _, args, kw: without_masks((args, kw)), with_kwargs=True
        )


def without_masks(arguments: Any) -> Any:
    """Nested arguments with None in place of boolean tensors [...]."""
    return tree_map(lambda one: None if _is_mask(one) else one, arguments)


def _is_mask(one: Any) -> bool:
    return isinstance(one, Tensor) and one.dtype == torch.bool


@dataclass
class Call:
    """A block and the arguments with which the network calls it."""

    block: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def forward(self) -> list[Tensor]:
        """The outputs [B, S, C]."""
        found = self.block(*self.arguments, **self.keywords)
        return [one for one in (found if isinstance(found, tuple) else (found,)) if one is not None]

    def unmasked(self) -> "Call":
        """The same without a mask."""
        arguments, keywords = without_masks((self.arguments, self.keywords))
        return Call(self.block, arguments, keywords)

    def leaves(self) -> "Call":
        """The same with bfloat16 tensors [B, ...] of two axes and more as leaves with gradients."""

        def leaf(one: Any) -> Any:
            wanted = isinstance(one, Tensor) and one.dtype == torch.bfloat16 and one.ndim > 1
            return one.detach().requires_grad_() if wanted else one

        arguments, keywords = tree_map(leaf, (self.arguments, self.keywords))
        return Call(self.block, arguments, keywords)


@torch.no_grad()
def calls(network: Any, keywords: Mapping[str, Any]) -> dict[str, Call]:
    """The first block of each kind, and its arguments in a forward of the network."""
    found: dict[str, Call] = {}
    kinds = {"dual": network.transformer_blocks[0], "single": network.single_transformer_blocks[0]}

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            found[name] = Call(module, args, kwargs)

        return note

    hooks = [
        block.register_forward_pre_hook(noting(name), with_kwargs=True)
        for name, block in kinds.items()
    ]
    network(**keywords)
    for hook in hooks:
        hook.remove()
    return found
