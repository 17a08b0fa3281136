"""Attention and feed-forward side by side, by one layer into both and one out, of shared sequences.

What diffusers' Flux2ParallelSelfAttnProcessor computes on one rank.
"""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.models.attention import joint
from fastgrpo.parallel.sequence_parallel import Layout


class SharedAttention:
    """Attention over ranks of one sequence of both kinds of tokens, the text's first.

    The fused layers see this rank's tokens; tokens are exchanged for heads between them alone.
    """

    def __init__(self, layout: Layout, plain: Any) -> None:
        self.layout = layout
        self.plain = plain  # the processor of one rank, which knows the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The replicated text and this rank's image tokens, [B, L + n, C], after both.

        image_rotary_emb: cosines and sines of text and this rank's tokens, [L + n, D] each
        returns like hidden_states
        """
        fused = attn.to_qkv_mlp_proj(hidden_states)
        attending, inner = fused.tensor_split([3 * attn.inner_dim], -1)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in attending.chunk(3, -1))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (joint.rotated(x, image_rotary_emb) for x in (q, k))
        text = slice(0, self.layout.text)
        out = self.layout.attend(q, k=k, v=v, text=text, backend=self.plain._attention_backend)
        out = out.flatten(2).to(q.dtype)  # [B, L + n, C]
        result: Tensor = attn.to_out(torch.cat([out, attn.mlp_act_fn(inner)], -1))
        return result
