"""Copies to the host's memory that the device's queue of kernels need not wait for."""

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory; from a GPU it is only under way, and the host goes on. On the CPU, the tensor.

    Work that is queued on the same stream sees it whole; the host itself must wait for the stream first.
    """
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
