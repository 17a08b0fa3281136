"""UNet2DConditionModel of latent diffusion, level by level, from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgrpo.core.config import Model
from fastgrpo.models.sizes.units import SAMPLE, TEXT, VIDEO, Attention, Batch, Block, Network, Unit

OF_RESNET, OF_OUTPUT, OF_TRANSFORMER = 8.7, 3.3, 62.2
"""Bytes kept per place and channel of a resnet's input, its output, and a transformer; bfloat16.

Measured, level by level, by `python -m benchmarks.plan.check --calibrate`; so are the numbers
below.
"""
AGAIN = 0.74  # share of a UNet's forward that diffusers recomputes: resnets and inner transformers
WORKING = 1.16  # a level at work, over what it keeps
RECOMPUTED = 148.0
"""Bytes per place and channel of the first level, of a whole UNet that is recomputed.

diffusers recomputes its resnets and inner transformer blocks: what lies between those is kept.
"""
FORWARD = 51.0  # likewise, without gradients: a transformer at work and the skips, in bfloat16


@dataclass(eq=False)
class Level(Block):
    """A level of the UNet, whose activations are proportional to the latent's places.

    With recomputation the levels' inner parts are recomputed, in every level.
    """

    area: float = 1.0  # places per place of the latent
    saved: float = 0.0  # bytes per place of the latent kept for the backward, in bfloat16

    def repeated(self, settings: Model, number: int) -> float:
        return AGAIN if settings.gradient_checkpointing else 0.0

    def forward(self, batch: Batch) -> float:
        return FORWARD * batch.width * batch.video * batch.element / 2

    def stored(self, batch: Batch) -> float:
        return 0.0 if batch.recomputed else self.saved * batch.video * batch.element / 2

    def working(self, batch: Batch) -> float:
        kept = RECOMPUTED * batch.width if batch.recomputed else WORKING * self.saved
        return kept * batch.video * batch.element / 2


def unet(config: Mapping[str, Any]) -> Network:
    """The network of a config of UNet2DConditionModel, as Stable Diffusion 1.x and 2.x have it."""
    first, last = config["block_out_channels"][0], config["block_out_channels"][-1]
    rest = Unit("")
    rest.conv("conv_in", config["in_channels"], first, (3, 3))
    rest.embedder("time_embedding", first, 4 * first)
    rest.norm("conv_norm_out", first, bias=True)
    rest.conv("conv_out", first, config["out_channels"], (3, 3))
    builder = Levels(config)
    levels, skips = _down(config, builder)
    middle = Level("mid_block", area=levels[-1].area)
    builder.resnet(middle, "resnets.0", last, last)
    builder.transformer(middle, "attentions.0", last)
    builder.resnet(middle, "resnets.1", last, last)
    return Network(
        blocks=(*levels, middle, *_up(config, builder, skips)), rest=rest, width=first, heads=1
    )


def _down(config: Mapping[str, Any], builder: "Levels") -> tuple[list[Level], list[int]]:
    """(The levels down to the middle, channels of what they hand to the levels up)."""
    channels, levels = config["block_out_channels"], []
    skips, before, area = [channels[0]], channels[0], 1.0
    for number, kind in enumerate(config["down_block_types"]):
        level, width = Level(f"down_blocks.{number}", area=area), channels[number]
        for n in range(config["layers_per_block"]):
            builder.resnet(level, f"resnets.{n}", before if n == 0 else width, width)
            if kind.startswith("CrossAttn"):
                builder.transformer(level, f"attentions.{n}", width)
            skips.append(width)
        if number < len(channels) - 1:
            area /= 4
            level.conv("downsamplers.0.conv", width, width, (3, 3), area=area)
            skips.append(width)
        before = width
        levels.append(level)
    return levels, skips


def _up(config: Mapping[str, Any], builder: "Levels", skips: list[int]) -> list[Level]:
    """The levels up from the middle.  skips: channels of what the levels down hand on, used up"""
    channels, levels = config["block_out_channels"], []
    before, area = channels[-1], 0.25 ** (len(channels) - 1)
    for place, kind in enumerate(config["up_block_types"]):
        number = len(channels) - 1 - place
        level, width = Level(f"up_blocks.{place}", area=area), channels[number]
        for n in range(config["layers_per_block"] + 1):
            builder.resnet(level, f"resnets.{n}", before + skips.pop(), width)
            before = width
            if kind.startswith("CrossAttn"):
                builder.transformer(level, f"attentions.{n}", width)
        if number:
            area *= 4
            level.conv("upsamplers.0.conv", width, width, (3, 3), area=area)
            level.saved += 2 * width * area
        levels.append(level)
    return levels


class Levels:
    """What a UNet's levels are made of."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.text: int = config["cross_attention_dim"]
        self.time: int = 4 * config["block_out_channels"][0]
        self.linear_projection: bool = config.get("use_linear_projection", False)

    def resnet(self, level: Level, name: str, inputs: int, outputs: int) -> None:
        """Add a residual block of two convolutions."""
        level.norm(f"{name}.norm1", inputs, bias=True)
        level.conv(f"{name}.conv1", inputs, outputs, (3, 3), area=level.area)
        level.linear(f"{name}.time_emb_proj", self.time, outputs, SAMPLE)
        level.norm(f"{name}.norm2", outputs, bias=True)
        level.conv(f"{name}.conv2", outputs, outputs, (3, 3), area=level.area)
        if inputs != outputs:
            level.conv(f"{name}.conv_shortcut", inputs, outputs, (1, 1), area=level.area)
        level.saved += (OF_RESNET * inputs + OF_OUTPUT * outputs) * level.area

    def transformer(self, level: Level, name: str, width: int) -> None:
        """Add a transformer of one block: self-attention, attention to the text, feed-forward."""
        area = level.area
        level.norm(f"{name}.norm", width, bias=True)
        for layer in ("proj_in", "proj_out"):
            if self.linear_projection:
                level.linear(f"{name}.{layer}", width, width, VIDEO, area=area)
            else:
                level.conv(f"{name}.{layer}", width, width, (1, 1), area=area)
        block = f"{name}.transformer_blocks.0"
        for number in (1, 2, 3):
            level.norm(f"{block}.norm{number}", width, bias=True)
        for attention, keys, inputs, keys_area in (
            ("attn1", VIDEO, width, area),
            ("attn2", TEXT, self.text, 1.0),
        ):
            level.linear(f"{block}.{attention}.to_q", width, width, VIDEO, bias=False, area=area)
            level.linear(
                f"{block}.{attention}.to_k", inputs, width, keys, bias=False, area=keys_area
            )
            level.linear(
                f"{block}.{attention}.to_v", inputs, width, keys, bias=False, area=keys_area
            )
            level.linear(f"{block}.{attention}.to_out.0", width, width, VIDEO, area=area)
            level.attentions.append(Attention(width=width, queries=VIDEO, keys=keys, area=area))
        level.saved += OF_TRANSFORMER * width * area
        level.linear(f"{block}.ff.net.0.proj", width, 8 * width, VIDEO, area=area)
        level.linear(f"{block}.ff.net.2", 4 * width, width, VIDEO, area=area)
