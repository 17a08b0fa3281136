"""The shapes of a family's network and of its VAE's decoder, from a config alone, and the products of matrices in them.

A plan is wanted in a second, and importing diffusers takes five: so the parameters of diffusers' classes are written
down here by their names. tests/fastgrpo/tools/plan/test_planner.py compares them with the classes themselves. Where
tokens go is noted with each matrix, since that is what FLOPs and activations are proportional to.
"""

import math
from collections.abc import Mapping
from typing import Any

from fastgrpo.core.errors import UserError
from fastgrpo.tools.plan.network.unet import unet
from fastgrpo.tools.plan.network.units import BOTH, SAMPLE, TEXT, VIDEO, Attention, Network, Unit, time_embedder

TIME_CHANNELS = 256  # of the sinusoids that diffusers' transformers embed the time with
FLUX_PATCH = 2  # latent places per token and side; the pipeline's, the network's own is 1


def network(family: str, config: Mapping[str, Any]) -> Network:
    """The network of a family with this config.

    Raises UserError where the config has what none of the family's published networks has.
    """
    builders = {
        "hunyuan_video": _hunyuan, "skyreels_i2v": _hunyuan, "flux": _flux, "wan": _wan, "stable_diffusion": unet,
    }  # fmt: skip
    if family not in builders:
        raise UserError(f"model.family='{family}': no plan for it; plans know {', '.join(builders)}.")
    try:
        return builders[family](config)
    except KeyError as error:
        raise UserError(f"model.path: the network's config has no {error}; correct model.family or the path.") from None


def _feed_forward(unit: Unit, name: str, width: int, hidden: int, where: str) -> None:
    unit.linear(f"{name}.net.0.proj", width, hidden, where)
    unit.linear(f"{name}.net.2", hidden, width, where)


def _dual(name: str, width: int, head: int, hidden: int) -> Unit:
    """A block of HunyuanVideo or FLUX with separate weights for video and text, and joint attention."""
    unit = Unit(name, "dual")
    unit.linear("norm1.linear", width, 6 * width, SAMPLE)
    unit.linear("norm1_context.linear", width, 6 * width, SAMPLE)
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        unit.linear(f"attn.{layer}", width, width, VIDEO)
    for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        unit.linear(f"attn.{layer}", width, width, TEXT)
    for layer in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width, BOTH, BOTH))
    _feed_forward(unit, "ff", width, hidden, VIDEO)
    _feed_forward(unit, "ff_context", width, hidden, TEXT)
    return unit


def _single(name: str, width: int, head: int, hidden: int) -> Unit:
    """A block of HunyuanVideo or FLUX over one sequence of both, attention and feed-forward side by side."""
    unit = Unit(name, "single")
    unit.linear("norm.linear", width, 3 * width, SAMPLE)
    unit.linear("proj_mlp", width, hidden, BOTH)
    unit.linear("proj_out", width + hidden, width, BOTH)
    for layer in ("to_q", "to_k", "to_v"):
        unit.linear(f"attn.{layer}", width, width, BOTH)
    for layer in ("norm_q", "norm_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width, BOTH, BOTH))
    return unit


def _hunyuan(config: Mapping[str, Any]) -> Network:
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, patch, text = heads * head, config["patch_size"], config["text_embed_dim"]
    hidden, kernel = int(width * config["mlp_ratio"]), (config.get("patch_size_t", 1), patch, patch)
    rest = Unit("", "rest")
    rest.conv("x_embedder.proj", config["in_channels"], width, kernel, VIDEO)
    time_embedder(rest, "context_embedder.time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    time_embedder(rest, "context_embedder.time_text_embed.text_embedder", text, width)
    rest.linear("context_embedder.proj_in", text, width, TEXT)
    for number in range(config["num_refiner_layers"]):
        name = f"context_embedder.token_refiner.refiner_blocks.{number}"
        rest.norm(f"{name}.norm1", width, bias=True)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            rest.linear(f"{name}.attn.{layer}", width, width, TEXT)
        rest.attentions.append(Attention(width, TEXT, TEXT, shared=False))
        rest.norm(f"{name}.norm2", width, bias=True)
        _feed_forward(rest, f"{name}.ff", width, 4 * width, TEXT)
        rest.linear(f"{name}.norm_out.linear", width, 2 * width, SAMPLE)
    time_embedder(rest, "time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    time_embedder(rest, "time_text_embed.text_embedder", config["pooled_projection_dim"], width)
    if config.get("guidance_embeds", True):
        time_embedder(rest, "time_text_embed.guidance_embedder", TIME_CHANNELS, width)
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, math.prod(kernel) * config["out_channels"], VIDEO)
    blocks = [_dual(f"transformer_blocks.{n}", width, head, hidden) for n in range(config["num_layers"])]
    more = [_single(f"single_transformer_blocks.{n}", width, head, hidden) for n in range(config["num_single_layers"])]
    return Network((*blocks, *more), rest, width, heads)


def _flux(config: Mapping[str, Any]) -> Network:
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, taken = heads * head, config["in_channels"]
    rest = Unit("", "rest")
    time_embedder(rest, "time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    if config.get("guidance_embeds", False):
        time_embedder(rest, "time_text_embed.guidance_embedder", TIME_CHANNELS, width)
    time_embedder(rest, "time_text_embed.text_embedder", config["pooled_projection_dim"], width)
    rest.linear("context_embedder", config["joint_attention_dim"], width, TEXT)
    rest.linear("x_embedder", taken, width, VIDEO)
    rest.linear("norm_out.linear", width, 2 * width, SAMPLE)
    rest.linear("proj_out", width, config.get("out_channels") or taken, VIDEO)
    blocks = [_dual(f"transformer_blocks.{n}", width, head, 4 * width) for n in range(config["num_layers"])]
    singles = range(config["num_single_layers"])
    more = [_single(f"single_transformer_blocks.{n}", width, head, 4 * width) for n in singles]
    return Network((*blocks, *more), rest, width, heads)


def _wan(config: Mapping[str, Any]) -> Network:
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, patch = heads * head, config["patch_size"]
    rest = Unit("", "rest")
    rest.weights["scale_shift_table"] = (1, 2, width)
    rest.conv("patch_embedding", config["in_channels"], width, patch, VIDEO)
    time_embedder(rest, "condition_embedder.time_embedder", config["freq_dim"], width)
    rest.linear("condition_embedder.time_proj", width, 6 * width, SAMPLE)
    time_embedder(rest, "condition_embedder.text_embedder", config["text_dim"], width, TEXT)
    rest.linear("proj_out", width, config["out_channels"] * math.prod(patch), VIDEO)
    blocks = []
    for number in range(config["num_layers"]):
        unit = Unit(f"blocks.{number}", "wan")
        unit.weights[f"{unit.name}.scale_shift_table"] = (1, 6, width)
        for attention, of_text in (("attn1", VIDEO), ("attn2", TEXT)):
            for layer, where in (("to_q", VIDEO), ("to_k", of_text), ("to_v", of_text), ("to_out.0", VIDEO)):
                unit.linear(f"{attention}.{layer}", width, width, where)
            unit.norm(f"{attention}.norm_q", width)
            unit.norm(f"{attention}.norm_k", width)
            unit.attentions.append(Attention(width, VIDEO, of_text))
        if config.get("cross_attn_norm", True):
            unit.norm("norm2", width, bias=True)
        _feed_forward(unit, "ffn", width, config["ffn_dim"], VIDEO)
        blocks.append(unit)
    return Network(tuple(blocks), rest, width, heads)
