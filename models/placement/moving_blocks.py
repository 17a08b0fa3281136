"""A network whose blocks come to the device when it is their turn, and give their place up then.

Bytes are moved, never numbers: what the network computes is what the whole one computes, bit for
bit. On the device lie what is outside the blocks, and two buffers of the largest block: while one
block computes, the next one arrives in the other buffer.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALIGNED = 256  # bytes: where a tensor begins in its block's buffer


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks: what the outermost module lists hold, in their order."""
    found: list[nn.Module] = []
    for child in network.children():
        found += child if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, each once, of any shapes [...]."""
    both = (*module.parameters(), *module.buffers())
    return list({id(tensor): tensor for tensor in both}.values())


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor [...], uint8 [N]; a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Block:
    """A block's tensors, and where each lies among the block's bytes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors = tensors_of(module)
        self.contents = [tensor.detach() for tensor in self.tensors]  # in host memory
        self.starts, self.size = [], 0
        for tensor in self.tensors:
            self.starts.append(self.size)
            self.size += -(-tensor.nbytes // ALIGNED) * ALIGNED

    def write(self, buffer: Tensor) -> None:
        """Put all contents where they belong in a buffer, uint8 [>= size], in host memory."""
        for start, content in zip(self.starts, self.contents, strict=True):
            buffer[start : start + content.nbytes].copy_(flat_bytes(content))

    def use(self, buffer: Tensor) -> None:
        """Let the block's tensors be those of a buffer, uint8 [>= size], on any device."""
        for tensor, start, content in zip(self.tensors, self.starts, self.contents, strict=True):
            part = buffer[start : start + content.nbytes]
            tensor.data = part.view(content.dtype).view(content.shape)

    def leave(self, device: torch.device) -> None:
        """Let the block have no contents: whoever reads them out of turn fails."""
        for tensor, content in zip(self.tensors, self.contents, strict=True):
            tensor.data = torch.empty(0, dtype=content.dtype, device=device)


class Source(Protocol):
    """Where a block's bytes come from."""

    def start(self, number: int, buffer: Tensor) -> Callable[[], object]:
        """Begin to fill a buffer, uint8 [N] on the device, with a block.

        returns what waits for it. Work that is queued on the current stream may still read the
        buffer: it is awaited first.
        """

    def enter(self) -> None:
        """Be told that a forward begins."""

    def close(self) -> None:
        """Give back what the source holds."""


class HostMemory:
    """Blocks that stay in host memory, or in files that are mapped there.

    A thread copies a block into pinned memory, and from there to the GPU. What a mapped file needs
    from the disk is read by that copy, ahead of the block's turn.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="text-encoder-blocks")
        if device.type == "cuda":
            size = max(block.size for block in blocks)
            self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.stream = torch.cuda.Stream(device)

    def start(self, number: int, buffer: Tensor) -> Callable[[], object]:
        """Have the thread fill a buffer, uint8 [>= size] on the device, with a block."""
        if self.device.type != "cuda":
            return self.reader.submit(self.blocks[number].write, buffer).result
        released = torch.cuda.current_stream(self.device).record_event()
        return self.reader.submit(self._bring, self.blocks[number], buffer, released).result

    def _bring(self, block: Block, buffer: Tensor, released: torch.cuda.Event) -> None:
        """In the thread.  buffer: uint8 [>= size] on the GPU"""
        block.write(self.staging)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(released)
            buffer[: block.size].copy_(self.staging[: block.size], non_blocking=True)
        self.stream.synchronize()  # the staging memory is free for the next block

    def enter(self) -> None:
        pass

    def close(self) -> None:
        self.reader.shutdown()


class Shards:
    """Blocks of which each rank of a group holds an equal part on its device.

    All ranks gather a block together, so all must go through the same number of forwards: each
    announces its own, and a rank that has none left takes part in the others' by `finish`.
    """

    def __init__(
        self, blocks: Sequence[Block], device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self.device, self.group = device, group
        rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shards = []
        for block in blocks:
            share = -(-block.size // self.ranks)
            whole = torch.zeros(share * self.ranks, dtype=torch.uint8)
            block.write(whole)
            # cloned: a view would keep the whole block
            self.shards.append(whole[rank * share : (rank + 1) * share].clone().to(device))
            block.contents = [
                torch.empty_like(content, device="meta") for content in block.contents
            ]

    def start(self, number: int, buffer: Tensor) -> Callable[[], object]:
        """Gather a block into a buffer, uint8 [>= size] on the device."""
        shard = self.shards[number]
        whole = buffer[: len(shard) * self.ranks]
        work = dist.all_gather_single(whole, shard, group=self.group, async_op=True)
        assert work is not None
        wait: Callable[[], object] = work.wait
        return wait

    def enter(self) -> None:
        self._announce(True)

    def _announce(self, forward: bool) -> bool:
        """Whether any rank begins a forward now; they all come here together."""
        count = torch.tensor(float(forward), device=self.device)
        dist.all_reduce(count, group=self.group)
        return bool(count)

    def finish(self, gather_all: Callable[[], None]) -> None:
        """Take part in the other ranks' forwards until they have finished, too."""
        while self._announce(False):
            gather_all()

    def close(self) -> None:
        self.shards.clear()


class MovingBlocks:
    """Hooks on a network in host memory that bring each block to the device for its forward."""

    def __init__(self, network: nn.Module, device: torch.device, source: str) -> None:
        """Take a network's blocks.  source: a way of placing it, "sharded" or "streamed" """
        self.device = device
        modules = blocks_of(network)
        inside = {id(tensor) for module in modules for tensor in tensors_of(module)}
        network._apply(lambda tensor: tensor if id(tensor) in inside else tensor.to(device))
        self.blocks = [Block(module) for module in modules]
        group = dist.group.WORLD if source == "sharded" else None
        self.source: Source = (
            HostMemory(self.blocks, device) if group is None else Shards(self.blocks, device, group)
        )
        ranks = 1 if group is None else dist.get_world_size(group)
        # gathered parts are equal: the last one is padded
        room = max(-(-block.size // ranks) * ranks for block in self.blocks)
        self.buffers = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(2)]
        self.waits: dict[int, Callable[[], object]] = {}
        self.hooks = [network.register_forward_pre_hook(lambda *_: self.source.enter())]
        for number, module in enumerate(modules):
            self.blocks[number].leave(device)
            self.hooks.append(module.register_forward_pre_hook(partial(self._before, number)))
            self.hooks.append(module.register_forward_hook(partial(self._after, number)))

    def finish(self) -> None:
        """Take part in other ranks' forwards until all have finished their step."""
        if isinstance(self.source, Shards):
            self.source.finish(self._pass_through)

    def close(self) -> None:
        """Give back the memory on the device; the network has no contents any more."""
        for wait in self.waits.values():
            wait()
        for hook in self.hooks:
            hook.remove()
        self.source.close()
        self.waits, self.blocks, self.buffers = {}, [], []

    def _pass_through(self) -> None:
        """Gather every block as a forward does, and compute nothing."""
        for number in range(len(self.blocks)):
            self._arrive(number)

    def _before(self, number: int, *_: object) -> None:
        self._arrive(number)
        self.blocks[number].use(self.buffers[number % 2])

    def _after(self, number: int, *_: object) -> None:
        self.blocks[number].leave(self.device)

    def _arrive(self, number: int) -> None:
        """Wait for a block, and ask for the next one, into the buffer of the one before."""
        wait = self.waits.pop(number, None) or self._start(number)
        wait()
        if number + 1 < len(self.blocks):
            self.waits[number + 1] = self._start(number + 1)

    def _start(self, number: int) -> Callable[[], object]:
        return self.source.start(number, self.buffers[number % 2])


def held(network: nn.Module) -> Iterator[Tensor]:
    """The network's tensors outside its blocks, of any shapes [...]."""
    inside = {id(tensor) for module in blocks_of(network) for tensor in tensors_of(module)}
    yield from (tensor for tensor in tensors_of(network) if id(tensor) not in inside)
