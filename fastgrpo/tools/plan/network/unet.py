"""The UNet of Stable Diffusion 1.x and 2.x, level by level, from its config alone."""

from collections.abc import Mapping
from typing import Any

from fastgrpo.tools.plan.network.units import SAMPLE, TEXT, VIDEO, Attention, Network, Unit, time_embedder


def unet(config: Mapping[str, Any]) -> Network:
    """UNet2DConditionModel of Stable Diffusion 1.x and 2.x."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    builder = Levels(config)
    time = 4 * channels[0]
    rest = Unit("", "rest")
    rest.conv("conv_in", config["in_channels"], channels[0], (3, 3), VIDEO)
    time_embedder(rest, "time_embedding", channels[0], time)
    rest.norm("conv_norm_out", channels[0], bias=True)
    rest.conv("conv_out", channels[0], config["out_channels"], (3, 3), VIDEO)
    blocks, skips, area = [], [channels[0]], 1.0
    for level, kind in enumerate(config["down_block_types"]):
        unit, before, width = Unit(f"down_blocks.{level}", "unet"), channels[max(level - 1, 0)], channels[level]
        for n in range(layers):
            builder.resnet(unit, f"resnets.{n}", before if n == 0 else width, width, area)
            if kind.startswith("CrossAttn"):
                builder.transformer(unit, f"attentions.{n}", width, level, area)
            skips.append(width)
        if level < len(channels) - 1:
            area /= 4
            unit.conv("downsamplers.0.conv", width, width, (3, 3), VIDEO, area)
            skips.append(width)
        blocks.append(unit)
    unit, width = Unit("mid_block", "unet"), channels[-1]
    builder.resnet(unit, "resnets.0", width, width, area)
    builder.transformer(unit, "attentions.0", width, len(channels) - 1, area)
    builder.resnet(unit, "resnets.1", width, width, area)
    blocks.append(unit)
    before = channels[-1]
    for place, kind in enumerate(config["up_block_types"]):
        level = len(channels) - 1 - place
        unit, width = Unit(f"up_blocks.{place}", "unet"), channels[level]
        for n in range(layers + 1):
            builder.resnet(unit, f"resnets.{n}", before + skips.pop(), width, area)
            before = width
            if kind.startswith("CrossAttn"):
                builder.transformer(unit, f"attentions.{n}", width, level, area)
        if level:
            area *= 4
            unit.conv("upsamplers.0.conv", width, width, (3, 3), VIDEO, area)
            unit.saved += 2 * width * area
        blocks.append(unit)
    return Network(tuple(blocks), rest, channels[0], 1)


class Levels:
    """What a UNet's levels are made of.

    Bytes kept per place and channel were measured, block by block, by `python -m benchmarks.plan.check --calibrate`.
    """

    OF_RESNET, OF_OUTPUT, OF_TRANSFORMER = 8.7, 3.3, 62.2

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.text: int = config["cross_attention_dim"]
        self.time: int = 4 * config["block_out_channels"][0]
        self.linear_projection: bool = config.get("use_linear_projection", False)

    def resnet(self, unit: Unit, name: str, inputs: int, outputs: int, area: float) -> None:
        unit.norm(f"{name}.norm1", inputs, bias=True)
        unit.conv(f"{name}.conv1", inputs, outputs, (3, 3), VIDEO, area)
        unit.linear(f"{name}.time_emb_proj", self.time, outputs, SAMPLE)
        unit.norm(f"{name}.norm2", outputs, bias=True)
        unit.conv(f"{name}.conv2", outputs, outputs, (3, 3), VIDEO, area)
        if inputs != outputs:
            unit.conv(f"{name}.conv_shortcut", inputs, outputs, (1, 1), VIDEO, area)
        unit.saved += (self.OF_RESNET * inputs + self.OF_OUTPUT * outputs) * area

    def transformer(self, unit: Unit, name: str, width: int, level: int, area: float) -> None:
        unit.norm(f"{name}.norm", width, bias=True)
        for layer in ("proj_in", "proj_out"):
            if self.linear_projection:
                unit.linear(f"{name}.{layer}", width, width, VIDEO, area=area)
            else:
                unit.conv(f"{name}.{layer}", width, width, (1, 1), VIDEO, area)
        block = f"{name}.transformer_blocks.0"
        for number in (1, 2, 3):
            unit.norm(f"{block}.norm{number}", width, bias=True)
        for attention, keys, inputs, keys_area in (("attn1", VIDEO, width, area), ("attn2", TEXT, self.text, 1.0)):
            unit.linear(f"{block}.{attention}.to_q", width, width, VIDEO, False, area)
            unit.linear(f"{block}.{attention}.to_k", inputs, width, keys, False, keys_area)
            unit.linear(f"{block}.{attention}.to_v", inputs, width, keys, False, keys_area)
            unit.linear(f"{block}.{attention}.to_out.0", width, width, VIDEO, area=area)
            unit.attentions.append(Attention(width, VIDEO, keys, area))
        unit.saved += self.OF_TRANSFORMER * width * area
        unit.linear(f"{block}.ff.net.0.proj", width, 8 * width, VIDEO, area=area)
        unit.linear(f"{block}.ff.net.2", 4 * width, width, VIDEO, area=area)
