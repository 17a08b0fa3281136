"""Blocks of diffusers' video and image transformers: what several families are made of.

The bytes that a block keeps per token and channel are those of diffusers' eager kernels, measured
on one block of each kind by `python -m benchmarks.plan.check --calibrate`, and written down with
the family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from fastgrpo.models.sizes.units import (
    ATTENDING,
    ATTENDING_TEXT,
    BOTH,
    SAMPLE,
    TEXT,
    VIDEO,
    Attention,
    Batch,
    Block,
    Unit,
)

TIME_CHANNELS = 256  # of the sinusoids that diffusers' transformers embed the time with


@dataclass(frozen=True)
class Kept:
    """Bytes per token and channel, of video and of text tokens."""

    forward: tuple[float, float]  # the most at once without gradients
    saved: tuple[float, float]  # kept for the backward where the block is not recomputed
    working: tuple[float, float]  # the most at once in the block's backward, what is saved included
    exchange: float = 0.0  # more per video token with sequence parallelism: packed for other ranks
    # read and written by a recomputation that keeps what attention and linear layers gave
    moved: tuple[float, float] = (0.0, 0.0)

    def with_more(self, video: float) -> "Kept":
        """With so many bytes more per video token, saved and in the backward."""
        saved, working = (
            (self.saved[0] + video, self.saved[1]),
            (self.working[0] + video, self.working[1]),
        )
        return replace(self, saved=saved, working=working)


KeptBy = Mapping[int, Kept]
"""By the bytes of a number in compute precision, 2 or 4."""


@dataclass(eq=False)
class TokenBlock(Block):
    """A transformer's block, whose activations are proportional to its tokens."""

    kept: KeptBy = field(default_factory=dict)

    def forward(self, batch: Batch) -> float:
        return self._bytes(batch, self.kept[batch.element].forward)

    def stored(self, batch: Batch) -> float:
        return (
            self.inputs(batch)
            if batch.recomputed
            else self._bytes(batch, self.kept[batch.element].saved)
        )

    def working(self, batch: Batch) -> float:
        inputs = self.inputs(batch) if batch.recomputed else 0.0
        return inputs + self._bytes(batch, self.kept[batch.element].working)

    def moved(self, batch: Batch) -> float:
        video, text = self.kept[batch.element].moved
        return batch.width * (video * batch.video + text * batch.text)

    def _bytes(self, batch: Batch, per_token: tuple[float, float]) -> float:
        more = self.kept[batch.element].exchange if batch.shared else 0.0
        return batch.width * ((per_token[0] + more) * batch.video + per_token[1] * batch.text)


class TextBlock(TokenBlock):
    """A transformer's block through which the text alone goes."""

    def inputs(self, batch: Batch) -> float:
        return float(batch.element * batch.width * batch.text)


class JointBlock(TokenBlock):
    """A transformer's block through which the text goes as well."""

    unreduced = Fraction(1, 3)

    def inputs(self, batch: Batch) -> float:
        return float(batch.element * batch.width * (batch.video + batch.text))


def dual_block(name: str, heads: int, head: int, hidden: int, kept: KeptBy) -> Block:
    """Separate weights for video and text, and joint attention.  head: channels of one"""
    unit, width = JointBlock(name, kept=kept), heads * head
    unit.linear("norm1.linear", width, 6 * width, SAMPLE)
    unit.linear("norm1_context.linear", width, 6 * width, SAMPLE)
    for layer in ATTENDING:
        unit.linear(f"attn.{layer}", width, width, VIDEO)
    for layer in ATTENDING_TEXT:
        unit.linear(f"attn.{layer}", width, width, TEXT)
    for layer in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width=width, queries=BOTH, keys=BOTH))
    unit.feed_forward("ff", width, hidden, VIDEO)
    unit.feed_forward("ff_context", width, hidden, TEXT)
    return unit


def single_block(name: str, heads: int, head: int, hidden: int, kept: KeptBy) -> Block:
    """One sequence of both, attention and feed-forward side by side.  head: channels of one"""
    unit, width = JointBlock(name, kept=kept), heads * head
    unit.linear("norm.linear", width, 3 * width, SAMPLE)
    unit.linear("proj_mlp", width, hidden, BOTH)
    unit.linear("proj_out", width + hidden, width, BOTH)
    for layer in ("to_q", "to_k", "to_v"):
        unit.linear(f"attn.{layer}", width, width, BOTH)
    for layer in ("norm_q", "norm_k"):
        unit.norm(f"attn.{layer}", head)
    unit.attentions.append(Attention(width=width, queries=BOTH, keys=BOTH))
    return unit


def joint_blocks(
    config: Mapping[str, Any], hidden: int, dual: KeptBy, single: KeptBy
) -> tuple[Block, ...]:
    """The dual-stream blocks of a config, then the single-stream ones.

    hidden: channels inside the feed-forward;  dual, single: bytes that the blocks keep
    """
    sizes = {
        "heads": config["num_attention_heads"],
        "head": config["attention_head_dim"],
        "hidden": hidden,
    }
    first = [
        dual_block(f"transformer_blocks.{n}", **sizes, kept=dual)
        for n in range(config["num_layers"])
    ]
    singles = range(config["num_single_layers"])
    return (
        *first,
        *(single_block(f"single_transformer_blocks.{n}", **sizes, kept=single) for n in singles),
    )


def lumina_block(name: str, where: str, width: int, heads: int, time: int, kept: KeptBy) -> Block:
    """Lumina's kind: each of attention and a gated feed-forward between two norms.

    where: VIDEO, TEXT or BOTH, which it has as one sequence;  time: channels of the embedded time,
    which blocks of text alone do not take
    """
    kind = {VIDEO: TokenBlock, TEXT: TextBlock, BOTH: JointBlock}[where]
    unit, hidden = kind(name, kept=kept), int(width / 3 * 8)
    for layer in ATTENDING:
        unit.linear(f"attention.{layer}", width, width, where, bias=False)
    for layer in ("norm_q", "norm_k"):
        unit.norm(f"attention.{layer}", width // heads)
    shared = where != TEXT
    unit.attentions.append(Attention(width=width, queries=where, keys=where, shared=shared))
    unit.linear("feed_forward.w1", width, hidden, where, bias=False)
    unit.linear("feed_forward.w2", hidden, width, where, bias=False)
    unit.linear("feed_forward.w3", width, hidden, where, bias=False)
    for layer in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
        unit.norm(layer, width)
    if where != TEXT:
        unit.linear("adaLN_modulation.0", time, 4 * width, SAMPLE)
    return unit


def token_refiner(rest: Unit, name: str, config: Mapping[str, Any], width: int) -> None:
    """Add the transformer of a config that refines the text before the blocks."""
    text = config["text_embed_dim"]
    rest.embedder(f"{name}.time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    rest.embedder(f"{name}.time_text_embed.text_embedder", text, width)
    rest.linear(f"{name}.proj_in", text, width, TEXT)
    for number in range(config["num_refiner_layers"]):
        block = f"{name}.token_refiner.refiner_blocks.{number}"
        rest.norm(f"{block}.norm1", width, bias=True)
        for layer in ATTENDING:
            rest.linear(f"{block}.attn.{layer}", width, width, TEXT)
        rest.attentions.append(Attention(width=width, queries=TEXT, keys=TEXT, shared=False))
        rest.norm(f"{block}.norm2", width, bias=True)
        rest.feed_forward(f"{block}.ff", width, 4 * width, TEXT)
        rest.linear(f"{block}.norm_out.linear", width, 2 * width, SAMPLE)
