"""Stage (d): the share of the measured peak that HunyuanVideo's blocks achieve.

A block of each kind, dual and single, at the recipe's 12,600 video and 256 text tokens, by batch,
kernel and compilation. The share is what 20 and 40 of them achieve together. FLOPs are those of
products and attention; recomputation counts as work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import hunyuan, measure
from benchmarks.gpu.hunyuan import Call, Size
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

GROUPS = (1, 2, 4)
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
LIBRARIES = ("flash", "_flash_3")  # names of diffusers' attention backends
Calls = dict[str, Call]


class Bench:
    """A network of one block of each kind, and how its blocks are measured."""

    def __init__(self, setup: Setup, report: Report) -> None:
        self.report, self.where = report, measure.device()
        small = measure.is_small(setup)
        self.size: Size = hunyuan.size(
            small, num_layers=1, num_single_layers=1, num_refiner_layers=1
        )
        self.network = hunyuan.network(self.size, self.where)
        self.peak = measure.peak_tflops(setup)

    def calls(self, batch: int) -> Calls:
        """Both blocks' calls, without a mask, for so many samples."""
        return {name: call.unmasked() for name, call in self.masked(batch).items()}

    def masked(self, batch: int) -> Calls:
        """The same with the mask that diffusers' network makes."""
        keywords = hunyuan.inputs(self.size, batch, self.where, torch.bfloat16)
        return hunyuan.calls(self.network, keywords)

    def forward(self, what: str, calls: Calls, batch: int) -> float:
        """Report forwards without gradients.  returns the share of the peak"""
        with torch.no_grad():
            return self._measure(what, {n: c.forward for n, c in calls.items()}, (batch, 1.0, 1.0))

    def train(self, what: str, calls: Calls, batch: int, again: bool = False) -> float:
        """Report forwards and backwards, recomputed or not.  returns the share of the peak"""
        works = {name: _training(call.leaves(), again) for name, call in calls.items()}
        return self._measure(what, works, (batch, 3.0 + again, 3.5 + again))

    def _measure(
        self,
        what: str,
        works: dict[str, Callable[[], Any]],
        amount: tuple[int, float, float],
    ) -> float:
        """amount: samples, and passes over the products and over attention, in forwards"""
        batch, products, attention = amount
        each = self.size.block_flops
        flops = batch * (products * each[0] + attention * each[1])
        taken = {name: measure.seconds(work, self.where) for name, work in works.items()}
        peak = max(measure.peak_gib(work, self.where) for work in works.values())
        shares = {name: flops / one / 1e12 / self.peak for name, one in taken.items()}
        blocks = {"dual": hunyuan.DUAL, "single": hunyuan.SINGLE}
        whole = sum(blocks[name] * one for name, one in taken.items())
        weighted = sum(blocks.values()) * flops / whole / 1e12 / self.peak
        note = ", ".join(f"{n} {1e3 * one:.1f} ms {shares[n]:.0%}" for n, one in taken.items())
        note += f"; 20 + 40: {whole:.2f} s" + (f", {peak:.2f} GiB" if peak == peak else "")
        self.report.row(what, round(100 * weighted, 1), "% of peak", note)
        return weighted


def _training(call: Call, again: bool) -> Callable[[], None]:
    """A forward and a backward; `again`: what the block keeps is recomputed."""

    def work() -> None:
        if again:
            found: Any = checkpoint(call.forward, use_reentrant=False)
        else:
            found = call.forward()
        torch.autograd.backward(found, [torch.ones_like(one) for one in found])
        call.block.zero_grad(set_to_none=True)

    return work


def run(setup: Setup, report: Report) -> None:
    """Measure batches, recomputation, mask, kernels and compilation; calibrate the plan."""
    bench = Bench(setup, report)
    note = f"{bench.size.tokens:,} tokens, width {bench.size.width:,}"
    report.row("measured peak", bench.peak, "TFLOP/s", note)
    _batches(bench)
    with report.attempt("G = 1, with a mask, forward"):
        calls = bench.masked(1)
        bench.forward("G = 1, with a mask, forward", calls, 1)
        bench.train("G = 1, with a mask, forward + backward", calls, 1)
    measure.free(bench.where)
    _kernels(bench)
    _compiled(bench)


def _batches(bench: Bench) -> None:
    for batch in GROUPS:
        with bench.report.attempt(f"G = {batch}"):
            calls = bench.calls(batch)
            share = bench.forward(f"G = {batch}, forward", calls, batch)
            if batch == 1:
                bench.report.calibrate(rollout=share)
            share = bench.train(f"G = {batch}, recomputed, forward + backward", calls, batch, True)
            if batch == 1:
                bench.report.calibrate(update=share)
            bench.train(f"G = {batch}, forward + backward", calls, batch)
        measure.free(bench.where)


def _kernels(bench: Bench) -> None:
    """Each of torch's attention kernels, then those of libraries through diffusers."""
    for name in KERNELS:
        with bench.report.attempt(f"kernel {name.lower()}"), _kernel(name, bench.where):
            calls = bench.calls(1)
            bench.forward(f"kernel {name.lower()}, forward", calls, 1)
            bench.train(f"kernel {name.lower()}, forward + backward", calls, 1)
        measure.free(bench.where)
    for name in LIBRARIES:
        with bench.report.attempt(f"diffusers' backend {name}"):
            bench.network.set_attention_backend(name)
            calls = bench.calls(1)
            bench.forward(f"diffusers' backend {name}, forward", calls, 1)
            bench.train(f"diffusers' backend {name}, forward + backward", calls, 1)
    with bench.report.attempt("diffusers' backend native"):
        bench.network.set_attention_backend("native")


@contextmanager
def _kernel(name: str, where: torch.device) -> Iterator[None]:
    """Attention by this kernel of torch's alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if where.type != "cuda":
        raise RuntimeError("no GPU")
    with sdpa_kernel([getattr(SDPBackend, name)]):
        yield


def _compiled(bench: Bench) -> None:
    """torch.compile of each block, in a bench of its own network's blocks."""
    for dynamic in (False, True) if bench.where.type == "cuda" else (False,):
        name = f"compiled{', dynamic' if dynamic else ''}"
        with bench.report.attempt(name):
            torch._dynamo.reset()
            calls = bench.calls(1)
            made = {
                n: Call(torch.compile(c.block, dynamic=dynamic), c.arguments, c.keywords)  # type: ignore[arg-type]
                for n, c in calls.items()
            }
            bench.forward(f"{name}, forward", made, 1)
            bench.train(f"{name}, forward + backward", made, 1)
            bench.train(f"{name}, recomputed, forward + backward", made, 1, True)
        measure.free(bench.where)
