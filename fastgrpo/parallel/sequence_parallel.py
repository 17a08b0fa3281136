"""Sequence parallelism for video tokens: Ulysses (Jacobs et al. 2023, arXiv 2309.14509), by hooks and processors.

diffusers' classes stay unmodified. The ranks of a group work on one batch. Video tokens are split, in any uneven way;
text tokens are replicated. Hooks split what leaves the patch embedding and the rotary tables, and gather what leaves
the output projection, so that every rank has the whole velocity: log-probabilities are means over all tokens on each
rank, and the ratio is that of one rank. Inside attention, tokens are exchanged for heads and back.

Gradients: every collective here has its exact adjoint as backward (all-to-all: its inverse; gather: reduce-scatter).
Each rank then holds the derivative of the sum of all ranks' equal losses with respect to its own copy of the weights,
and FSDP's mean over the ranks is the derivative of the loss, without any scaling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import Group

LAYERS = ("to_q", "to_k", "to_v", "norm_q", "norm_k")


TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class _AllToAll(torch.autograd.Function):
    """Rows dealt out to the ranks and the ranks' rows put together; its backward is the opposite exchange."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: list[int], take: list[int], group: dist.ProcessGroup) -> Tensor:
        """rows: [sum(give), ...];  returns [sum(take), ...]"""
        ctx.exchange = (give, take, group)
        received = rows.new_empty(sum(take), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), take, give, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        give, take, group = ctx.exchange
        returned = grads[0].new_empty(sum(give), *grads[0].shape[1:])
        dist.all_to_all_single(returned, grads[0].contiguous(), give, take, group=group)
        return returned, None, None, None


class _Gather(torch.autograd.Function):
    """All ranks' rows on every rank; the backward sums what all ranks' losses say of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        """rows: [sizes[rank], ...];  returns [sum(sizes), ...]"""
        ctx.exchange = (sizes, group)
        # as an all-to-all in which each rank gives all its rows to every rank: gloo gathers equal sizes only
        copies = rows.contiguous().repeat(len(sizes), *[1] * (rows.ndim - 1))
        received = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_to_all_single(received, copies, sizes, [len(rows)] * len(sizes), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sizes, group = ctx.exchange
        own = sizes[dist.get_rank(group)]
        parts = grads[0].new_empty(own * len(sizes), *grads[0].shape[1:])
        dist.all_to_all_single(parts, grads[0].contiguous(), [own] * len(sizes), sizes, group=group)
        return parts.reshape(len(sizes), own, *grads[0].shape[1:]).sum(0), None, None


def tokens_to_heads(x: Tensor, tokens: int, sp: Group) -> Tensor:
    """This rank's tokens of all heads to all tokens of this rank's heads.

    x: [B, n, H, D], n = this rank's part of `tokens`;  returns [B, tokens, H / P, D]
    """
    batch, own, heads, dim = x.shape
    share = heads // sp.size
    rows = x.reshape(batch, own, sp.size, share, dim).permute(2, 1, 0, 3, 4).flatten(0, 1)  # [P n, B, H/P, D]
    received = _AllToAll.apply(rows, [own] * sp.size, sp.sizes(tokens), sp.group)  # type: ignore[no-untyped-call]
    assert isinstance(received, Tensor)
    return received.transpose(0, 1)


def heads_to_tokens(x: Tensor, tokens: int, sp: Group) -> Tensor:
    """The inverse of `tokens_to_heads`.  x: [B, tokens, H / P, D];  returns [B, n, H, D]"""
    batch, _, share, dim = x.shape
    own = len(sp.part(tokens))
    received = _AllToAll.apply(x.transpose(0, 1), sp.sizes(tokens), [own] * sp.size, sp.group)  # type: ignore[no-untyped-call]
    assert isinstance(received, Tensor)
    return received.reshape(sp.size, own, batch, share, dim).permute(2, 1, 0, 3, 4).reshape(batch, own, -1, dim)


def gather(x: Tensor, dim: int, total: int, sp: Group) -> Tensor:
    """All ranks' parts along a dimension of `total`, on every rank."""
    gathered = _Gather.apply(x.transpose(0, dim), sp.sizes(total), sp.group)  # type: ignore[no-untyped-call]
    assert isinstance(gathered, Tensor)
    return gathered.transpose(0, dim)


@dataclass
class Layout:
    """Where the tokens of the forward under way are; written by the hooks, read by the attention."""

    sp: Group
    video: int = 0  # tokens of all ranks
    text: int = 0  # text tokens at the front of a single-stream block's sequence (FLUX)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: slice, backend: Any) -> Tensor:
        """Joint attention of this rank's video tokens and the replicated text.

        q, k, v: [B, n + L, H, D];  text: where the L text tokens are, at one end;  returns [B, n + L, H, D]
        """
        sp, first = self.sp, text.start == 0
        heads = sp.part(q.shape[2])

        def exchange(x: Tensor) -> Tensor:
            own_text = x[:, text]
            video = x[:, text.stop :] if first else x[:, : text.start]
            both = [tokens_to_heads(video, self.video, sp), own_text[:, :, heads.start : heads.stop]]
            return torch.cat(both[::-1] if first else both, 1)

        out = dispatch_attention_fn(exchange(q), exchange(k), exchange(v), backend=backend)
        length = text.stop - text.start
        about_text = out[:, :length] if first else out[:, self.video :]
        about_video = out[:, length:] if first else out[:, : self.video]
        both = [heads_to_tokens(about_video, self.video, sp), gather(about_text, 2, q.shape[2], sp)]
        return torch.cat(both[::-1] if first else both, 1)


class HunyuanAttention:
    """HunyuanVideo's and SkyReels' joint attention, video tokens first, of dual-stream and single-stream blocks."""

    def __init__(self, layout: Layout, plain: Any) -> None:
        self.layout = layout
        self.plain = plain  # the processor of one rank: knows which texts are padded, and the attention backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self.plain.by_branch(
            lambda video, text: self._attend(attn, video, text, image_rotary_emb), hidden_states, encoder_hidden_states
        )
        return both

    def _attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        own, length = hidden_states.shape[1], encoder_hidden_states.shape[1]
        dual = attn.add_q_proj is not None
        sequence = hidden_states if dual else torch.cat([hidden_states, encoder_hidden_states], 1)
        q, k, v = _heads(attn, sequence, LAYERS)
        if image_rotary_emb is not None:
            q, k = (torch.cat([_rotated(x[:, :own], image_rotary_emb), x[:, own:]], 1) for x in (q, k))
        if dual:
            about_text = _heads(attn, encoder_hidden_states, TEXT_LAYERS)
            q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), about_text, strict=True))
        where = slice(own, own + length)
        out = self.layout.attend(q, k, v, where, self.plain._attention_backend).flatten(2).to(q.dtype)
        video, text = out[:, :own], out[:, own:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


class FluxAttention:
    """FLUX's joint attention, text tokens first; a single-stream block gets one sequence of both."""

    def __init__(self, layout: Layout, plain: Any) -> None:
        self.layout = layout
        self.plain = plain

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = _heads(attn, hidden_states, LAYERS)
        if encoder_hidden_states is not None:
            about_text = _heads(attn, encoder_hidden_states, TEXT_LAYERS)
            q, k, v = (torch.cat(pair, 1) for pair in zip(about_text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = _rotated(q, image_rotary_emb), _rotated(k, image_rotary_emb)
        length = self.layout.text
        where = slice(0, length)
        out = self.layout.attend(q, k, v, where, self.plain._attention_backend).flatten(2).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, length:].contiguous())), attn.to_add_out(
            out[:, :length].contiguous()
        )


class WanAttention:
    """Wan's self-attention. Its cross-attention to the replicated text needs no exchange: queries stay local."""

    def __init__(self, layout: Layout, plain: Any) -> None:
        self.layout = layout
        self.plain = plain

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        if rotary_emb is not None:
            q, k = _rotated_pairs(q, *rotary_emb), _rotated_pairs(k, *rotary_emb)
        tokens, sp = self.layout.video, self.layout.sp
        q, k, v = (tokens_to_heads(x, tokens, sp) for x in (q, k, v))
        out = heads_to_tokens(dispatch_attention_fn(q, k, v, backend=self.plain._attention_backend), tokens, sp)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states)))


def _heads(attn: Any, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by the layers of these names, the first two normalised.  returns [B, S, H, D] each"""
    query, key, value, norm_query, norm_key = (getattr(attn, name, None) for name in names)
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (query, key, value))  # type: ignore[misc]
    return (q if norm_query is None else norm_query(q)), (k if norm_key is None else norm_key(k)), v


def _rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    rotated: Tensor = apply_rotary_emb(x, table, sequence_dim=1)
    return rotated


def _rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels as the two parts of a complex number, turned.  x: [B, S, H, D]"""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


def install(network: nn.Module, sp: Group) -> None:
    """Let the ranks of a group share each sequence of this network.

    Raises UserError for a network that cannot, or whose heads do not divide.
    """
    installers: dict[str, Callable[[Any, Layout], None]] = {
        "HunyuanVideoTransformer3DModel": _install_hunyuan,
        "FluxTransformer2DModel": _install_flux,
        "WanTransformer3DModel": _install_wan,
    }
    name = type(network).__name__
    if name not in installers:
        raise UserError(
            f"distributed.sp={sp.size}: a {name} has no sequence parallelism; use 1. Those with it: "
            f"{', '.join(installers)}."
        )
    config: Any = network.config
    heads: int = config.num_attention_heads
    if heads % sp.size:
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(f"distributed.sp={sp.size}: does not divide the network's {heads} heads; use one of {sizes}.")
    installers[name](network, Layout(sp))


def _split_tokens(layout: Layout) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:  # output: [B, N, C]
        layout.video = output.shape[1]
        part = layout.sp.part(layout.video)
        return output[:, part.start : part.stop]

    return hook


def _gather_tokens(layout: Layout) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:  # output: [B, n, C]
        return gather(output, 1, layout.video, layout.sp)

    return hook


def _install_hunyuan(network: Any, layout: Layout) -> None:
    def split_rotary(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part = layout.sp.part(len(output[0]))
        return tuple(table[part.start : part.stop] for table in output)  # [N, D] each

    network.rope.register_forward_hook(split_rotary)
    network.x_embedder.register_forward_hook(_split_tokens(layout))
    network.proj_out.register_forward_hook(_gather_tokens(layout))
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.attn.set_processor(HunyuanAttention(layout, block.attn.processor))


def _install_flux(network: Any, layout: Layout) -> None:
    def note_text(module: nn.Module, inputs: object, output: Tensor) -> None:
        layout.text = output.shape[1]

    def split_rotary(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part = layout.sp.part(len(output[0]) - layout.text)
        start, stop = layout.text + part.start, layout.text + part.stop
        return tuple(torch.cat([table[: layout.text], table[start:stop]]) for table in output)  # [L + N, D] each

    network.context_embedder.register_forward_hook(note_text)  # runs before the rotary tables are made
    network.pos_embed.register_forward_hook(split_rotary)
    network.x_embedder.register_forward_hook(_split_tokens(layout))
    network.proj_out.register_forward_hook(_gather_tokens(layout))
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.attn.set_processor(FluxAttention(layout, block.attn.processor))


def _install_wan(network: Any, layout: Layout) -> None:
    def split_patches(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        patches = output.flatten(2)  # [B, C, N]; what follows flattens the three axes that are given back here
        layout.video = patches.shape[2]
        part = layout.sp.part(layout.video)
        return patches[:, :, part.start : part.stop, None, None]

    def split_rotary(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        part = layout.sp.part(output[0].shape[1])
        return tuple(table[:, part.start : part.stop] for table in output)  # [1, N, 1, D] each

    network.rope.register_forward_hook(split_rotary)
    network.patch_embedding.register_forward_hook(split_patches)
    network.proj_out.register_forward_hook(_gather_tokens(layout))
    for block in network.blocks:
        block.attn1.set_processor(WanAttention(layout, block.attn1.processor))
