"""Self-attention whose rotary tables turn neighbouring channels in pairs, with shared sequences."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from fastgrpo.parallel.sequence_parallel import (
    Layout,
    heads_to_tokens,
    tokens_to_heads,
)


class SharedAttention:
    """Self-attention over ranks; cross-attention to the replicated text keeps its local queries."""

    def __init__(self, layout: Layout, plain: Any) -> None:
        self.layout = layout
        self.plain = plain  # the processor of one rank, which knows the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """This rank's video tokens after attention.  hidden_states: [B, n, C];  returns likewise

        rotary_emb: cosines and sines of this rank's tokens, [1, n, 1, D] each
        """
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        if rotary_emb is not None:
            q, k = rotated_pairs(q, *rotary_emb), rotated_pairs(k, *rotary_emb)
        tokens, sp = self.layout.video, self.layout.sp
        q, k, v = tokens_to_heads((q, k, v), tokens, sp)
        out = heads_to_tokens(
            dispatch_attention_fn(q, k, v, backend=self.plain._attention_backend), tokens, sp
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states)))


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels as the two parts of a complex number, turned.

    x: [B, n, H, D];  cos, sin: [1, n, 1, D];  returns [B, n, H, D]
    """
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return (
        torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
        .flatten(-2)
        .type_as(x)
    )
