"""Joint attention of image and text tokens without positions or mask, by a backend of choice.

What diffusers' JointAttnProcessor2_0 computes. That one calls torch's own kernel itself, whatever
`set_attention_backend` was told; this one dispatches.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from fastgrpo.models.attention import joint
from fastgrpo.parallel.sequence_parallel import Layout, heads_to_tokens, tokens_to_heads


class JointAttention:
    """Image tokens first, then the text's; image tokens alone where a block calls it so."""

    _attention_backend: Any = None  # by this name diffusers sets it
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens [B, n, C] and text [B, L, C], after attention.

        encoder_hidden_states: [B, L, C], or None of an image-only attention;  returns likewise
        """
        own = hidden_states.shape[1]
        q, k, v = joint.heads(attn, hidden_states)
        if encoder_hidden_states is not None:
            about_text = joint.heads(attn, encoder_hidden_states, joint.TEXT_LAYERS)
            q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), about_text, strict=True))
        out = self.attend(q, k=k, v=v, own=own).flatten(2).to(q.dtype)  # [B, n + L, C]
        image: Tensor = attn.to_out[1](attn.to_out[0](out[:, :own]))
        if encoder_hidden_states is None:
            return image
        text = out[:, own:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: int) -> Tensor:
        """q, k, v: [B, n + L, H, D];  own: n, image tokens of this rank;  returns like q"""
        out: Tensor = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        return out


class SharedAttention(JointAttention):
    """The same over ranks that share each image's tokens, the text replicated."""

    def __init__(self, layout: Layout, plain: JointAttention) -> None:
        self.layout = layout
        self.plain = plain  # knows the attention backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: int) -> Tensor:
        """q, k, v: [B, n + L, H, D];  own: n, image tokens of this rank;  returns like q"""
        backend, tokens, sp = self.plain._attention_backend, self.layout.video, self.layout.sp
        if q.shape[1] > own:
            text = slice(own, q.shape[1])
            return self.layout.attend(q, k=k, v=v, text=text, backend=backend)
        q, k, v = tokens_to_heads((q, k, v), tokens, sp)
        return heads_to_tokens(dispatch_attention_fn(q, k, v, backend=backend), tokens, sp)
