"""Attention of one sequence of image and text tokens without a mask, each text trimmed to its own
length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.models.attention import joint
from fastgrpo.parallel.sequence_parallel import Layout, heads_to_tokens, tokens_to_heads

Tables = Sequence[Tensor]
"""Complex numbers of a sequence's places, [S, D / 2], of each of guidance's branches; one alone
where all rows are of one length.
"""


def by_branch(attend: Callable[[Tensor, Tensor], Tensor], x: Tensor, tables: Tables) -> Tensor:
    """`attend`, or, where texts are padded, each branch by itself without the padding, for which
    zeros come out.

    attend: (x, table) -> like x;  x: [B, S, C], the branches' rows one after the other
    """
    if len(tables) == 1:
        return attend(x, tables[0])
    branches = zip(x.chunk(len(tables)), tables, strict=True)
    done = [attend(rows[:, : len(table)], table) for rows, table in branches]
    return torch.cat([pad(out, (0, 0, 0, x.shape[1] - out.shape[1])) for out in done])


class TrimmedAttention(ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """diffusers' attention to each text's own tokens, in place of a mask."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tables = (),
    ) -> Tensor:
        """Tokens [B, S, C] after attention."""
        attend = super().__call__
        return by_branch(
            lambda x, table: attend(attn, x, freqs_cis=table[None]), hidden_states, freqs_cis
        )


class SharedAttention:
    """The same over ranks that share each image's tokens, which come before the replicated text."""

    def __init__(self, layout: Layout, plain: TrimmedAttention) -> None:
        self.layout = layout
        self.plain = plain  # knows the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tables = (),
    ) -> Tensor:
        """This rank's image tokens and the text, [B, n + L, C], after attention."""
        return by_branch(lambda x, table: self._attend(attn, x, table), hidden_states, freqs_cis)

    def _attend(self, attn: Any, x: Tensor, table: Tensor) -> Tensor:
        """x: [B, n + L, C], texts of one length;  table: [n + L, D / 2];  returns like x"""
        q, k, v = joint.heads(attn, x)
        q, k = (apply_rotary_emb_qwen(part, table, use_real=False) for part in (q, k))
        layout, backend = self.layout, self.plain._attention_backend
        own, length = len(layout.sp.part(layout.video)), x.shape[1]
        if own == length:  # image tokens alone
            q, k, v = tokens_to_heads((q, k, v), layout.video, layout.sp)
            out = dispatch_attention_fn(q, k, v, backend=backend)
            out = heads_to_tokens(out, layout.video, layout.sp)
        else:
            out = layout.attend(q, k=k, v=v, text=slice(own, length), backend=backend)
        done: Tensor = attn.to_out[1](attn.to_out[0](out.flatten(2).to(q.dtype)))
        return done
