"""Joint attention of video and text tokens without a mask, each text trimmed to its own length."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo.models.attention import joint
from fastgrpo.parallel.sequence_parallel import Layout


class ByBranch:
    """A processor that lets guidance's two branches attend to texts of two lengths, each to its
    own.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of the texts of guidance's two branches; empty where all of a batch are of one length. Set
        # before each forward; a checkpointed block runs again before the next one.
        self.lengths: tuple[int, ...] = ()

    def by_branch(
        self, attend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], video: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`attend`, or, where texts are padded, each branch by itself without the padding, for
        which zeros come out.

        attend: (video, text) -> likewise;  video: [B, n, D];  text: [B, L, D], both branches' rows
        one after the other
        """
        if not self.lengths:
            return attend(video, text)
        branches = zip(video.chunk(2), text.chunk(2), self.lengths, strict=True)
        done = [attend(video, text[:, :length]) for video, text, length in branches]
        texts = [pad(text, (0, 0, 0, max(self.lengths) - text.shape[1])) for _, text in done]
        return torch.cat([video for video, _ in done]), torch.cat(texts)


class TrimmedAttention(ByBranch, HunyuanVideoAttnProcessor2_0):  # type: ignore[misc]
    """diffusers' attention to the text's own tokens in place of a mask, which would rule flash
    attention out.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens [B, N, C] and text [B, L, C] after attention.

        image_rotary_emb: cosines and sines of the video tokens, [N, D] each
        """
        attend = super().__call__
        return self.by_branch(
            lambda video, text: attend(attn, video, text, image_rotary_emb=image_rotary_emb),
            hidden_states,
            encoder_hidden_states,
        )


class SharedAttention:
    """Joint attention over ranks, video tokens first, of dual-stream and single-stream blocks."""

    def __init__(self, layout: Layout, plain: TrimmedAttention) -> None:
        self.layout = layout
        self.plain = plain  # knows which texts are padded, and the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This rank's video tokens [B, n, C] and the replicated text [B, L, C], after attention.

        image_rotary_emb: cosines and sines of this rank's tokens, [n, D] each;  returns likewise
        """
        return self.plain.by_branch(
            lambda video, text: self._attend(attn, video, text, image_rotary_emb),
            hidden_states,
            encoder_hidden_states,
        )

    def _attend(
        self, attn: Any, video: Tensor, text: Tensor, table: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of rows whose texts are of one length.

        video: [B, n, C];  text: [B, L, C];  table: [n, D] each;  returns like video and text
        """
        own, length = video.shape[1], text.shape[1]
        dual = attn.add_q_proj is not None
        q, k, v = joint.heads(attn, video if dual else torch.cat([video, text], 1))
        if table is not None:
            q, k = (torch.cat([joint.rotated(x[:, :own], table), x[:, own:]], 1) for x in (q, k))
        if dual:
            about_text = joint.heads(attn, text, joint.TEXT_LAYERS)
            q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), about_text, strict=True))
        out = self.layout.attend(
            q, k=k, v=v, text=slice(own, own + length), backend=self.plain._attention_backend
        )
        out = out.flatten(2).to(q.dtype)  # [B, n + L, C]
        video, text = out[:, :own], out[:, own:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text
