"""Seconds, memory and peaks of a device. Imports torch, and nothing of fastgrpo."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import report
from benchmarks.gpu.schedule import Setup

LEAST_S, MOST = 0.3, 10  # how long and how often a piece of work is repeated
PEAK_SIDE, SMALL_SIDE = 8192, 512


def device() -> torch.device:
    """The first GPU; the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_small(setup: Setup) -> bool:
    """Whether sizes must suit a CPU."""
    return setup.small or device().type == "cpu"


def wait(where: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if where.type == "cuda":
        torch.cuda.synchronize()


def times(work: Callable[[], Any], where: torch.device) -> list[float]:
    """Seconds of repetitions of `work`, after one that is not counted."""
    work()
    wait(where)
    taken: list[float] = []
    while not taken or (sum(taken) < LEAST_S and len(taken) < MOST):
        begun = time.perf_counter()
        work()
        wait(where)
        taken.append(time.perf_counter() - begun)
    return taken


def seconds(work: Callable[[], Any], where: torch.device) -> float:
    """The median of `times`."""
    return statistics.median(times(work, where))


def peak_gib(work: Callable[[], Any], where: torch.device) -> float:
    """GiB of tensors at the peak of `work`, all that was there before included; NaN on a CPU."""
    if where.type != "cuda":
        work()
        return math.nan
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait(where)
    return torch.cuda.max_memory_allocated() / 2**30


def product_tflops(
    rows: int, inner: int, columns: int, dtype: torch.dtype, where: torch.device
) -> float:
    """10^12 FLOPs per second of the quickest product [rows, inner] x [inner, columns]."""
    a = torch.randn(rows, inner, device=where, dtype=dtype)
    b = torch.randn(inner, columns, device=where, dtype=dtype)
    out = torch.empty(rows, columns, device=where, dtype=dtype)
    best = min(times(lambda: torch.mm(a, b, out=out), where))
    return 2.0 * rows * inner * columns / best / 1e12


def square_tflops(setup: Setup, dtype: torch.dtype) -> float:
    """10^12 FLOPs per second of a product of square matrices."""
    side = SMALL_SIDE if is_small(setup) else PEAK_SIDE
    return product_tflops(side, inner=side, columns=side, dtype=dtype, where=device())


def peak_tflops(setup: Setup) -> float:
    """The device's bfloat16 peak as stage `machine` measured it, else measured now."""
    known = report.read(setup.file("machine")).get("numbers", {})
    return float(known.get("tflops") or square_tflops(setup, torch.bfloat16))


def free(where: torch.device) -> None:
    """Give back what no tensor uses."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of tensors [...] are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
