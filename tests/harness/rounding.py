"""bfloat16 products that round otherwise for other batch sizes, as a GPU's kernels do.

A CPU rounds alike in any batch. Here the inner dimension of a product is summed in parts, each
rounded, as split-K with reduced precision does; their number follows from the batch size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLAIN: Callable[..., Tensor] = nn.functional.linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [B, ..., K];  weight: [N, K];  bias: [N];  returns [B, ..., N]"""
    parts = 1 + len(x) % 4
    if x.dtype != torch.bfloat16 or parts == 1:
        return PLAIN(x, weight, bias)
    pieces = zip(x.chunk(parts, -1), weight.chunk(parts, -1), strict=True)
    total = torch.zeros(*x.shape[:-1], len(weight), device=x.device)
    for a, b in reversed(list(pieces)):
        total = total + (a @ b.T).float()
    return (total if bias is None else total + bias.float()).to(x.dtype)


def install() -> None:
    """Put it in for the rest of the process."""
    vars(nn.functional)["linear"] = linear


@contextmanager
def by_batch() -> Iterator[None]:
    """Put it in inside."""
    install()
    try:
        yield
    finally:
        vars(nn.functional)["linear"] = PLAIN
