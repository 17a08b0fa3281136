"""Sequence parallelism for video tokens by hooks and attention processors.

The method is Ulysses (Jacobs et al. 2023, arXiv 2309.14509); diffusers' classes stay unmodified.
The ranks of a group work on one batch. Video tokens are split, also unevenly; text tokens are
replicated. Hooks split the outputs of the patch embedding and of the rotary tables, and gather the
output projection's, so that every rank has the whole velocity: log-probabilities are means over all
tokens on each rank, and the ratio is that of one rank. Inside attention, tokens are exchanged for
heads and back.

A family says where its hooks and processors go: a function share_sequence(network, layout) in
models/NAME.py puts them in by the `Layout`'s methods.

Shapes: B samples, N video tokens of all ranks, n this rank's, L text tokens, H heads, D channels of
a head, P ranks.

Gradients: every collective here has its exact adjoint as backward (all-to-all: its inverse; gather:
reduce-scatter). Each rank then holds the derivative of the sum of all ranks' equal losses with
respect to its own copy of the weights, and FSDP's mean over the ranks is the derivative of the
loss, without any scaling.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.parallel.world import Group


class _AllToAll(torch.autograd.Function):
    """Exchange rows among the ranks; the backward is the opposite exchange."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        give: list[int],
        take: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        """rows: [sum(give), ...];  returns [sum(take), ...]"""
        ctx.exchange = (give, take, group)
        received = rows.new_empty(sum(take), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), take, give, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """grads: one, [sum(take), ...];  returns the gradient of rows, [sum(give), ...]"""
        give, take, group = ctx.exchange
        returned = grads[0].new_empty(sum(give), *grads[0].shape[1:])
        dist.all_to_all_single(returned, grads[0].contiguous(), give, take, group=group)
        return returned, None, None, None


class _Gather(torch.autograd.Function):
    """Gather all ranks' rows on every rank; the backward sums all ranks' gradients of own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        """rows: [sizes[rank], ...];  returns [sum(sizes), ...]"""
        ctx.exchange = (sizes, group)
        # as an all-to-all in which each rank gives all its rows to every rank: gloo gathers equal
        # sizes only
        copies = rows.contiguous().repeat(len(sizes), *[1] * (rows.ndim - 1))
        received = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_to_all_single(received, copies, sizes, [len(rows)] * len(sizes), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """grads: one, [sum(sizes), ...];  returns the gradient of rows, [sizes[rank], ...]"""
        sizes, group = ctx.exchange
        own = sizes[dist.get_rank(group)]
        parts = grads[0].new_empty(own * len(sizes), *grads[0].shape[1:])
        dist.all_to_all_single(parts, grads[0].contiguous(), [own] * len(sizes), sizes, group=group)
        return parts.reshape(len(sizes), own, *grads[0].shape[1:]).sum(0), None, None


def tokens_to_heads(parts: Sequence[Tensor], tokens: int, sp: Group) -> tuple[Tensor, ...]:
    """Exchange this rank's tokens of all heads for all tokens of this rank's heads, all at once.

    parts: queries, keys and values, [B, n, H, D] each, n = this rank's part of `tokens`
    returns [B, tokens, H / P, D] each, views of what one exchange brought
    """
    own = parts[0].shape[1]
    rows = torch.cat([rearrange(x, "b n (p h) d -> (p n) b h d", p=sp.size) for x in parts], -1)
    give, take = [own] * sp.size, sp.sizes(tokens)
    received = _AllToAll.apply(rows, give, take, sp.group)  # type: ignore[no-untyped-call]
    assert isinstance(received, Tensor)
    return received.transpose(0, 1).split([x.shape[-1] for x in parts], -1)


def heads_to_tokens(x: Tensor, tokens: int, sp: Group) -> Tensor:
    """The inverse of `tokens_to_heads`.  x: [B, tokens, H / P, D];  returns [B, n, H, D]"""
    give, take = sp.sizes(tokens), [len(sp.part(tokens))] * sp.size
    rows = x.transpose(0, 1)
    received = _AllToAll.apply(rows, give, take, sp.group)  # type: ignore[no-untyped-call]
    assert isinstance(received, Tensor)
    return rearrange(received, "(p n) b h d -> b n (p h) d", p=sp.size)


def gather(x: Tensor, dim: int, total: int, sp: Group) -> Tensor:
    """All ranks' parts along a dimension, on every rank.

    x: [..., this rank's part of `total`, ...], split along `dim`;  returns [..., total, ...]
    """
    rows, sizes = x.transpose(0, dim), sp.sizes(total)
    gathered = _Gather.apply(rows, sizes, sp.group)  # type: ignore[no-untyped-call]
    assert isinstance(gathered, Tensor)
    return gathered.transpose(0, dim)


@dataclass(kw_only=True)
class Layout:
    """A forward's token counts, and the processors that a family put into its network.

    The hooks write the counts, the attention reads them.
    """

    sp: Group
    video: int = 0  # tokens of all ranks
    text: int = 0  # text tokens at the front of a sequence of both, where a network has such
    active: bool = True
    attentions: list[tuple[Any, Any, Any]] = field(default_factory=list)
    """(attention module, its processor of a single rank, its processor of shared sequences)"""

    def after(self, module: Any, hook: Callable[[Any], Any]) -> None:
        """Call `hook` with each output of a module, which its result replaces unless it is None."""
        module.register_forward_hook(lambda _, inputs, out: hook(out) if self.active else None)

    def process(self, attention: Any, shared: Callable[["Layout", Any], Any]) -> None:
        """Give an attention module the processor shared(layout, plain).

        plain: the module's processor of a single rank
        """
        plain = attention.processor
        attention.set_processor(shared(self, plain))
        self.attentions.append((attention, plain, attention.processor))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run whole sequences inside, on each rank by itself, without hooks and processors."""
        self.active = False
        for attention, plain, _ in self.attentions:
            attention.processor = plain
        try:
            yield
        finally:
            self.active = True
            for attention, _, shared in self.attentions:
                attention.processor = shared

    def split_tokens(self, x: Tensor) -> Tensor:
        """This rank's part of the embedded video tokens; notes their number.

        x: [B, N, C];  returns [B, n, C]
        """
        self.video = x.shape[1]
        part = self.sp.part(self.video)
        return x[:, part.start : part.stop]

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All ranks' video tokens.  x: [B, n, C];  returns [B, N, C]"""
        return gather(x, 1, self.video, self.sp)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: slice, backend: Any) -> Tensor:
        """Joint attention of this rank's video tokens and the replicated text.

        q, k, v: [B, n + L, H, D];  text: the L text tokens' positions, at one end
        returns [B, n + L, H, D]
        """
        sp, first = self.sp, text.start == 0
        heads = sp.part(q.shape[2])

        def video_of(x: Tensor) -> Tensor:
            """[B, n + L, H, D] to [B, n, H, D]."""
            return x[:, text.stop :] if first else x[:, : text.start]

        def with_text(video: Tensor, x: Tensor) -> Tensor:
            """[B, N, H / P, D] to [B, N + L, H / P, D], this rank's heads of all tokens."""
            both = [video, x[:, text, heads.start : heads.stop]]
            return torch.cat(both[::-1] if first else both, 1)

        own = (q, k, v)
        videos = tokens_to_heads([video_of(x) for x in own], self.video, sp)
        q, k, v = (with_text(video, x) for video, x in zip(videos, own, strict=True))
        out = dispatch_attention_fn(q, k, v, backend=backend)
        length = text.stop - text.start
        about_text = out[:, :length] if first else out[:, self.video :]
        about_video = out[:, length:] if first else out[:, : self.video]
        both = [
            heads_to_tokens(about_video, self.video, sp),
            gather(about_text, 2, own[0].shape[2], sp),
        ]
        return torch.cat(both[::-1] if first else both, 1)


ShareSequence = Callable[[Any, Layout], None]
"""A family's function: puts hooks and processors into its network, by the layout's methods."""


def install(network: Any, sp: Group, share_sequence: ShareSequence) -> None:
    """Let the ranks of a group share each sequence of this network.

    Raises UserError for a network whose family cannot share, or whose heads do not divide.
    """
    heads = heads_of(network)
    if isinstance(heads, int) and heads % sp.size:
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(
            f"distributed.sp={sp.size}: does not divide the network's {heads} heads; "
            f"use one of {sizes}."
        )
    layout = Layout(sp=sp)
    share_sequence(network, layout)
    network.sequence_layout = layout


def heads_of(network: Any) -> Any:
    """What the config of a network says of its attention heads, under either of its keys."""
    config = network.config
    return config.get("num_attention_heads", config.get("n_heads"))


@contextmanager
def alone(network: Any) -> Iterator[None]:
    """Let each rank run whole sequences by itself inside: suspend what `install` put in."""
    layout: Layout = network.sequence_layout
    with layout.suspended():
        yield
