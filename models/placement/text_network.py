"""A text encoder's network: read into host memory, placed as model.text_encoders says, freed."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastgrpo.core.errors import UserError
from fastgrpo.core.memory import free_memory
from fastgrpo.core.policy import Prompt
from fastgrpo.core.units import GIB
from fastgrpo.models.placement.moving_blocks import MovingBlocks, blocks_of, held, tensors_of
from fastgrpo.models.sizes.text_encoders import FREE_SHARE, WAYS, Sizes, check, possible


@dataclass(frozen=True)
class Work:
    """The largest batch of texts that a network is given."""

    texts: int
    longest: int  # tokens of a text, with what is around it
    per_channel: float  # bytes per token and channel in bfloat16, see sizes/text_encoders.py
    states: bool = False  # whether every layer's state is kept, 2 bytes more each
    around: int | None = None
    """Tokens beside the text's own; None: all texts are padded to `longest`."""

    def of(self, prompts: Sequence[Prompt]) -> "Work":
        """The largest batch of these prompts: a byte of a text is a token at most."""
        longest = self.longest
        if self.around is not None:
            texts = (len(prompt.text.encode()) for prompt in prompts)
            longest = min(longest, self.around + max(texts, default=0))
        return replace(self, texts=min(self.texts, len(prompts)), longest=longest)


UNKNOWN = Work(texts=32, longest=512, per_channel=46.0, states=True)  # as much as any family's


class TextNetwork:
    """A transformers network that is called as it is; the first call places it.

    Where several ranks encode together, `place` is called before, by all of them.
    """

    def __init__(self, network: nn.Module, part: str, device: torch.device) -> None:
        """Take a frozen network in host memory.  part: its part of the folder, for messages"""
        self.network: Any = network
        self.part, self.device = part, device
        self.work = UNKNOWN
        self.wanted = "auto"  # model.text_encoders
        self.way: str | None = None  # None: it lies in host memory
        self.moving: MovingBlocks | None = None

    @property
    def config(self) -> Any:
        """The network's own config."""
        return self.network.config

    def keep(self, inner: str) -> None:
        """Keep a module inside the network alone, which is then what is called."""
        self.network = self.network.get_submodule(inner)

    def sizes(self) -> Sizes:
        """Bytes of the network, of its largest block, and of its activations."""
        blocks = [sum(t.nbytes for t in tensors_of(block)) for block in blocks_of(self.network)]
        element = next(self.network.parameters()).itemsize
        width, tokens = self.config.hidden_size, self.work.texts * self.work.longest
        kept = self.work.per_channel + (2 * (len(blocks) + 1) if self.work.states else 0)
        return Sizes(
            outside=sum(tensor.nbytes for tensor in held(self.network)),
            blocks=sum(blocks),
            largest=max(blocks, default=0),
            at_work=element * width * tokens * kept / 2,
        )

    def place(self, together: bool = False) -> str:
        """Put the network where its way wants it.

        together: all ranks come here at once, and encode in step
        returns a line on it; empty: there is nothing to tell
        Raises UserError, alike on all of them, where no way fits.
        """
        sizes, ranks = self.sizes(), dist.get_world_size() if together else 1
        if together:
            check(self.wanted, ranks)
        room = self._room(together)
        way = _chosen(self, sizes, ranks, room)
        if way == "whole":
            self.network.to(self.device)
        else:
            self.moving = MovingBlocks(self.network, self.device, way)
        self.way = way
        if way == "whole" and self.device.type != "cuda":
            return ""
        taken, whole = (sizes.peak(one, ranks) / GIB for one in (way, "whole"))
        line = f"{self.part} encodes {WAYS[way]}: {taken:.2f} GiB of {self.device} at the peak"
        return line if way == "whole" else f"{line}, {whole:.2f} whole, {room / GIB:.2f} free"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.way is None:
            self.place()
        return self.network(*args, **kwargs)

    def finish(self) -> None:
        """Take part in other ranks' forwards until all have ended their step."""
        if self.moving is not None:
            self.moving.finish()

    def free(self) -> None:
        """Give back the memory; the network cannot be called any more."""
        if self.network is None:
            return
        if self.moving is not None:
            self.moving.close()
        self.network = self.moving = None
        gc.collect()
        if torch.cuda.is_initialized():  # once per network; a reward server may share the GPU
            torch.cuda.empty_cache()

    def _room(self, together: bool) -> float:
        """Bytes that the network may take on this device; together: on every rank's."""
        room = FREE_SHARE * free_memory(self.device) if self.device.type == "cuda" else float("inf")
        if not together:
            return room
        least = torch.tensor(room, dtype=torch.float64, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return float(least)


def _chosen(network: TextNetwork, sizes: Sizes, ranks: int, room: float) -> str:
    """The way of placing a network. Raises UserError where none is left."""
    where, wanted = f"model.text_encoders={network.wanted}", network.wanted
    if wanted == "sharded" and ranks == 1:
        wanted = "auto"  # one rank samples by itself: it has nobody to share with
    if not blocks_of(network.network):
        wanted = "whole"  # nothing that could come by itself
    way = sizes.way(wanted, ranks, room)
    if way is not None:
        return way
    least = min(sizes.peak(one, ranks) for one in possible(wanted, ranks))
    other = sizes.way("auto", ranks, room)
    remedy = (
        f"use {other}, or auto"
        if other is not None
        else "stop what else is on that GPU, or encode on a larger one with fastgrpo embed and "
        "share prompts.cache"
    )
    raise UserError(
        f"{where}: {network.part} takes {least / GIB:.2f} GiB of {network.device} and "
        f"{room / GIB:.2f} GiB are free; {remedy}."
    )
