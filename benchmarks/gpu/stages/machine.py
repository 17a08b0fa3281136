"""Stage (a): versions, the card, what it computes and moves at its best."""

import os
import platform
import subprocess
from datetime import date
from importlib import metadata

import torch
from torch import Tensor, nn

from benchmarks.gpu import measure
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

LIBRARIES = (
    "diffusers",
    "transformers",
    "peft",
    "einops",
    "triton",
    "flash_attn",
    "flash_attn_3",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
ASKED = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
STEP_BYTES = 44  # per parameter of clipping and AdamW in float32, as the plan counts them


def run(setup: Setup, report: Report) -> None:
    """Measure, the matrix products first: other stages' shares are of them."""
    where, small = measure.device(), measure.is_small(setup)
    name = torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {platform.machine()}"
    report.row("device", name, note=f"{date.today()}, {os.cpu_count()} cores")
    _products(setup, report)
    _versions(report)
    _clocks(report)
    _memory(report, where)
    with report.attempt("copy within the device's memory"):
        _copies(report, where, small)
    with report.attempt("clipping and AdamW"):
        _step(setup, report)


def _versions(report: Report) -> None:
    report.row(
        "torch",
        torch.__version__,
        note=f"CUDA {torch.version.cuda}, Python {platform.python_version()}",
    )
    if torch.cuda.is_available():
        with report.attempt("cuDNN and NCCL"):
            nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
            report.row("cuDNN", str(torch.backends.cudnn.version()), note=f"NCCL {nccl}")
    for library in LIBRARIES:
        try:
            report.row(library, metadata.version(library))
        except metadata.PackageNotFoundError:
            report.row(library, None, note="missing: not installed")


def _clocks(report: Report) -> None:
    """What nvidia-smi says of every GPU: clocks before the work has warmed them."""
    with report.attempt("nvidia-smi"):
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=15,
            check=True,
        ).stdout
        report.row("nvidia-smi", len(told.splitlines()), "GPUs", ASKED)
        for number, line in enumerate(told.splitlines()):
            report.row(f"GPU {number}", "", note=line.strip())


def _memory(report: Report, where: torch.device) -> None:
    if where.type == "cuda":
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        held = torch.cuda.memory_reserved() / 2**30
        report.row(
            "memory", total, "GiB", f"context and other processes {total - free - held:.2f} GiB"
        )
        report.row("GPUs", torch.cuda.device_count())
        report.row("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        report.row("memory", total, "GiB", "of the host")
    report.calibrate(memory_gib=total)


def _products(setup: Setup, report: Report) -> None:
    """Products of square matrices, and of the shape of HunyuanVideo's feed-forward."""
    where = measure.device()
    peak = measure.square_tflops(setup, torch.bfloat16)
    report.row("matrix product, bfloat16", peak, "TFLOP/s", "the peak that shares are of")
    report.calibrate(tflops=peak)
    before = torch.backends.cuda.matmul.allow_tf32
    for name, tf32 in (("float32", False), ("TF32", True)):
        with report.attempt(f"matrix product, {name}"):
            if tf32 and where.type != "cuda":
                raise RuntimeError("no GPU")
            torch.backends.cuda.matmul.allow_tf32 = tf32
            report.row(
                f"matrix product, {name}", measure.square_tflops(setup, torch.float32), "TFLOP/s"
            )
    torch.backends.cuda.matmul.allow_tf32 = before
    rows, width = (126, 128) if measure.is_small(setup) else (12_856, 3072)
    for inner, columns in ((width, 4 * width), (4 * width, width)):
        with report.attempt("matrix product of a block"):
            found = measure.product_tflops(
                rows, inner=inner, columns=columns, dtype=torch.bfloat16, where=where
            )
            what = f"matrix product, {rows:,} x {inner:,} x {columns:,}"
            report.row(what, found, "TFLOP/s", f"{found / peak:.0%} of the peak")


def _copies(report: Report, where: torch.device, small: bool) -> None:
    """Bytes per second within the device, from the pinned host and to another GPU."""
    size = 2**26 if small else 2**31
    source = torch.zeros(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    within = 2 * size / min(measure.times(lambda: target.copy_(source), where)) / 1e9
    report.row("copy within the device's memory", within, "GB/s", "read and written")
    report.calibrate(memory_gbs=within)
    if where.type != "cuda":
        return
    host = torch.zeros(size // 4, dtype=torch.uint8, pin_memory=True)
    part = target[: size // 4]
    coming = size / 4 / min(measure.times(lambda: part.copy_(host, non_blocking=True), where)) / 1e9
    report.row("copy from pinned host memory", coming, "GB/s")
    going = size / 4 / min(measure.times(lambda: host.copy_(part, non_blocking=True), where)) / 1e9
    report.row("copy to pinned host memory", going, "GB/s")
    report.calibrate(host_gbs=min(coming, going))
    for other in range(1, min(torch.cuda.device_count(), 8)):
        there = torch.empty(size, dtype=torch.uint8, device=f"cuda:{other}")
        peer = size / min(measure.times(lambda to=there: to.copy_(source), where)) / 1e9  # type: ignore[misc]
        report.row(f"copy from GPU 0 to GPU {other}", peer, "GB/s")


def _step(setup: Setup, report: Report) -> None:
    """Clipping and AdamW, which wait for memory."""
    where = measure.device()
    count = 2_000_000 if measure.is_small(setup) else 400_000_000
    parts: list[Tensor] = [
        torch.zeros(count // 8, device=where, requires_grad=True) for _ in range(8)
    ]
    for part in parts:
        part.grad = torch.full_like(part, 1e-3)
    optimizer = torch.optim.AdamW(parts, lr=1e-5, fused=where.type == "cuda")

    def step() -> None:
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()

    taken = measure.seconds(step, where)
    reached = STEP_BYTES * count / taken / 1e9
    share = reached / report.numbers["memory_gbs"]
    note = f"{reached:,.0f} GB/s, {share:.0%} of the copy"
    report.row(f"clipping and AdamW, {count / 1e6:.0f} M parameters", taken, "s", note)
    report.calibrate(memory=share)
