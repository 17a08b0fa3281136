"""Joint attention whose rotary tables are complex numbers, separate for image and text, no mask."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor

from fastgrpo.models.attention import joint
from fastgrpo.models.attention.trimmed import ByBranch
from fastgrpo.parallel.sequence_parallel import Layout

Tables = tuple[Tensor, Tensor]
"""Complex numbers of image tokens [n, D / 2] and of text tokens [L, D / 2]."""


class TrimmedAttention(ByBranch, QwenDoubleStreamAttnProcessor2_0):  # type: ignore[misc]
    """diffusers' attention to each text's own tokens, in place of a mask."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, C] and text [B, L, C] after attention."""
        assert image_rotary_emb is not None
        attend, (image_table, text_table) = super().__call__, image_rotary_emb

        def own(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            """image: [B, N, C];  text: [B, L, C], of one length;  returns likewise"""
            tables = (image_table, text_table[: text.shape[1]])
            done: tuple[Tensor, Tensor] = attend(attn, image, text, image_rotary_emb=tables)
            return done

        return self.by_branch(own, hidden_states, encoder_hidden_states)


class SharedAttention:
    """The same over ranks that share each image's tokens, text tokens first and replicated."""

    def __init__(self, layout: Layout, plain: TrimmedAttention) -> None:
        self.layout = layout
        self.plain = plain  # knows which texts are padded, and the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This rank's image tokens [B, n, C] and the text [B, L, C], after attention."""
        assert image_rotary_emb is not None
        tables = image_rotary_emb
        return self.plain.by_branch(
            lambda image, text: self._attend(attn, image, text, tables),
            hidden_states,
            encoder_hidden_states,
        )

    def _attend(
        self, attn: Any, image: Tensor, text: Tensor, tables: Tables
    ) -> tuple[Tensor, Tensor]:
        """image: [B, n, C];  text: [B, L, C];  returns likewise"""
        length = text.shape[1]
        parts = [joint.heads(attn, text, joint.TEXT_LAYERS), joint.heads(attn, image)]
        turned = [
            [*(apply_rotary_emb_qwen(x, table, use_real=False) for x in (q, k)), v]
            for (q, k, v), table in zip(parts, (tables[1][:length], tables[0]), strict=True)
        ]
        q, k, v = (torch.cat(pair, 1) for pair in zip(*turned, strict=True))
        out = self.layout.attend(
            q, k=k, v=v, text=slice(0, length), backend=self.plain._attention_backend
        )
        out = out.flatten(2).to(q.dtype)  # [B, L + n, C]
        about_image = attn.to_out[1](attn.to_out[0](out[:, length:].contiguous()))
        return about_image, attn.to_add_out(out[:, :length].contiguous())
