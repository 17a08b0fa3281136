"""Weights that visit a GPU: one pinned copy in host memory, from which they come each time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgrpo.core.memory import to_host


class VisitingWeights:
    """Frozen weights that share a GPU with others who need the memory in between.

    They are copied there again for each visit and dropped after it, never copied back. The host
    waits for neither. Their GPU memory belongs to the stream on which they come; the allocator
    keeps it for the next visit, and takes it back by itself where others run short.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        """Take the weights to the host.  device: the GPU that is visited"""
        self.device, self.here = device, False
        tensors: dict[int, Tensor] = {}
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                tensors[id(tensor)] = tensor
        self._homes = [(tensor, _pinned(tensor.detach(), device)) for tensor in tensors.values()]
        self.leave()

    @property
    def size(self) -> int:
        """Bytes on the GPU during a visit."""
        return sum(home.numel() * home.element_size() for _, home in self._homes)

    def come(self) -> None:
        """Copy the weights to the GPU, on the present stream."""
        for tensor, home in self._homes:
            tensor.data = home.to(self.device, non_blocking=True)
        self.here = True

    def leave(self) -> None:
        """Drop the GPU's copy. All work that reads it must be done."""
        for tensor, home in self._homes:
            tensor.data = home
        self.here = False


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor [...] in host memory, from where a GPU copies by itself."""
    if tensor.is_cuda:
        copy = to_host(tensor)
        torch.cuda.current_stream(device).synchronize()
        return copy
    return tensor.pin_memory() if device.type == "cuda" else tensor
