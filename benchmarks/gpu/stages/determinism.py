"""Stage (f): whether a backward, run again, is the same bit for bit.

With and without `torch.use_deterministic_algorithms`, which the "deterministic" rows have on.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu import hunyuan, measure
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
REPEATS = 4
LONGEST = 4096  # tokens of MATH, whose scores are whole in memory
Gradients = Callable[[], list[Tensor]]


def run(setup: Setup, report: Report) -> None:
    """Repeat the backward of attention, of a convolution and of both kinds of blocks."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at cuBLAS' first use; in both modes
    report.row("CUBLAS_WORKSPACE_CONFIG", ":4096:8", note="in both modes")
    size = hunyuan.size(measure.is_small(setup), num_layers=1, num_single_layers=1)
    where = measure.device()
    for strict in (False, True):
        mode = "deterministic" if strict else "plain"
        torch.use_deterministic_algorithms(strict)
        _attention(report, mode, size, where)
        with report.attempt(f"{mode}: patch embedding"):
            _compare(report, f"{mode}: patch embedding", _convolution(size, where))
        with report.attempt(f"{mode}: blocks"):
            keywords = hunyuan.inputs(size, 1, where, torch.bfloat16)
            calls = hunyuan.calls(hunyuan.network(size, where), keywords)
            for name, call in calls.items():
                with report.attempt(f"{mode}: {name} block"):
                    _compare(report, f"{mode}: {name} block", _block(call.unmasked().leaves()))
        measure.free(where)
    torch.use_deterministic_algorithms(False)


def _compare(report: Report, what: str, gradients: Gradients) -> None:
    """Report whether repetitions give the same gradients [...]."""
    first = gradients()
    same, largest = True, 0.0
    for _ in range(REPEATS - 1):
        again = gradients()
        same = same and measure.same_bits(first, again)
        pairs = zip(first, again, strict=True)
        largest = max(largest, *((a.float() - b.float()).abs().max().item() for a, b in pairs))
    note = f"{REPEATS} runs" + ("" if same else f", largest difference {largest:.1e}")
    report.row(f"{what}: the same bits", same, note=note)


def _attention(report: Report, mode: str, size: hunyuan.Size, where: torch.device) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, width = size.config["num_attention_heads"], size.config["attention_head_dim"]
    for name in ("any", *KERNELS):
        what = f"{mode}: attention, {name.lower()}"
        tokens = min(size.tokens, LONGEST) if name == "MATH" else size.tokens
        shape = (1, heads, tokens, width)
        q, k, v = (torch.randn(shape, device=where, dtype=torch.bfloat16) for _ in range(3))
        chosen = (
            list(SDPBackend.__members__.values()) if name == "any" else [getattr(SDPBackend, name)]
        )
        allowed = [one for one in chosen if one.name not in ("ERROR", "OVERRIDEABLE")]
        with report.attempt(what), sdpa_kernel(allowed):
            _compare(report, what, _attending([one.requires_grad_() for one in (q, k, v)]))


def _attending(leaves: list[Tensor]) -> Gradients:
    """Gradients of q, k and v, each [1, H, S, D]."""

    def gradients() -> list[Tensor]:
        """Gradients [...]."""
        query, key, value = leaves
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return list(torch.autograd.grad(out, leaves, torch.ones_like(out) * 1e-2))

    return gradients


def _convolution(size: hunyuan.Size, where: torch.device) -> Gradients:
    """Gradients of the patch embedding's weight and input."""
    layer = nn.Conv3d(16, size.width, (1, 2, 2), (1, 2, 2), device=where, dtype=torch.bfloat16)
    x = torch.randn(1, 16, *size.latent, device=where, dtype=torch.bfloat16, requires_grad=True)

    def gradients() -> list[Tensor]:
        """Gradients [...]."""
        out = layer(x)
        return list(torch.autograd.grad(out, [layer.weight, x], torch.ones_like(out)))

    return gradients


def _block(call: hunyuan.Call) -> Gradients:
    """Gradients of a block's parameters."""
    parameters = list(call.block.parameters())

    def gradients() -> list[Tensor]:
        """Gradients [...]."""
        out = call.forward()
        ones = [torch.ones_like(one) for one in out]
        return list(torch.autograd.grad(out, parameters, ones))

    return gradients
