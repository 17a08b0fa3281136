"""The bias that bfloat16 puts into the log-ratio where rollout and update batch differently.

    python -m benchmarks.speed.ratio_bias [--width 192] [--steps 0,12,23] [--json FILE]

Libraries choose other kernels for other numbers of rows, and those round otherwise. With z, the
difference of the two means over the step's std, an unchanged policy's log-ratio is
mean(e z) - mean(z^2) / 2. The first term is noise that a larger clip averages away; the second is a
bias, always negative, of the same size in any clip. Below the clip range, 1e-4, every negative
advantage is clipped: such a transition teaches only where its advantage is positive.

Measured is HunyuanVideo at full depth (20 + 40 blocks) and a smaller width, with random weights and
the project's own velocity, transition and log-probability. On a GPU the kernels are the real ones.
A CPU rounds alike in any batch; there "another kernel" is emulated as split-K: the inner dimension
of every product is summed in two parts in float32, in the other order, and rounded once.

"before": the old log-probability is the rollout's. "after": it is the update's own, as in the first
optimizer step and for all that was drawn in batches of another size (fastgrpo/training/update.py),
so that an unchanged policy has ratio 1 exactly.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from fastgrpo.algorithm.transitions import gaussian_log_prob, time_grid
from fastgrpo.core.config import Model
from fastgrpo.models.hunyuan_video import HunyuanVideo

CLIP_RANGE, ETA, STEPS, SHIFT = 1e-4, 0.3, 25, 5.0  # launch/t2v_hunyuan.toml
FULL = 806_400  # values of that recipe's latent: 16 x 14 x 60 x 60
HEAD, TEXT, TEXT_WIDTH, POOLED = 32, 20, 256, 64
SAMPLES = 4
VELOCITY = 1.4  # std of a trained network's velocity: data and noise of variance 1
GATES = ("norm1.linear", "norm1_context.linear", "norm.linear")


@dataclass(frozen=True)
class Case:
    """Batch sizes of rollout and update, and which products round otherwise where they differ."""

    rollout: int
    update: int
    rounds: str = "all"  # emulated: "all" products, or those of "rows", whose rows are the batch


@dataclass(frozen=True)
class Found:
    """One step of one case. Shares are of transitions whose |log ratio| is above the clip range."""

    cfg: float
    case: Case
    step: int
    difference: float  # of the velocities, |dv| / |v|
    bias: float  # -mean(z^2) / 2
    outside: float  # share, measured on the small clip
    outside_full: float  # share, of a clip of FULL values with this bias
    after: float  # largest |log ratio| with the update's own old log-probability


def policy(width: int, cfg: float, device: torch.device) -> HunyuanVideo:
    """HunyuanVideo of full depth with random weights in bfloat16, and small gates."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network: Any = HunyuanVideoTransformer3DModel(
            num_attention_heads=width // HEAD,
            attention_head_dim=HEAD,
            num_layers=20,
            num_single_layers=40,
            num_refiner_layers=2,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED,
            rope_axes_dim=(HEAD // 8, HEAD // 16 * 7, HEAD // 16 * 7),
        )
    network = nn.Module.to(network, torch.bfloat16).to_empty(device=device)
    network.eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = 0.3 if name.removesuffix(".weight").endswith(GATES) else 1.0
        nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)
    vae: Any = SimpleNamespace(config=SimpleNamespace())
    settings = Model(family="hunyuan_video", path=".", cfg=cfg, dtype="bfloat16")
    return HunyuanVideo(network, vae, SHIFT, settings, 6.0)


def kernel_of(case: Case, batch: int) -> int:
    """In how many parts the inner dimension is summed: another kernel for another batch."""
    return 1 if batch == case.update else 2


@contextmanager
def rounding(parts: int, rounds: str) -> Iterator[None]:
    """Products whose inner dimension is summed in so many parts, the last first."""
    plain: Callable[..., Tensor] = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K];  weight: [N, K];  bias: [N];  returns [..., N]"""
        if x.dtype != torch.bfloat16 or (rounds == "rows" and x.ndim > 2):
            return plain(x, weight, bias)
        pieces = zip(x.chunk(parts, -1), weight.chunk(parts, -1), strict=True)
        total = sum(a.float() @ b.float().T for a, b in reversed(list(pieces)))
        assert isinstance(total, Tensor)
        return (total if bias is None else total + bias.float()).to(x.dtype)

    if parts > 1:
        nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = plain


@dataclass(frozen=True)
class Batch:
    """States of one step, all at the same time, and their conditions."""

    x: Tensor  # [S, 16, F, H, W]
    t: Tensor  # [S]
    condition: dict[str, Tensor]  # each [S, ...]


def velocities(net: HunyuanVideo, batch: Batch, size: int) -> Tensor:
    """The velocity of the states, `size` of them at once.  returns float32 like x [S, ...]"""
    parts = []
    for start in range(0, len(batch.x), size):
        rows = slice(start, start + size)
        condition = {name: part[rows] for name, part in batch.condition.items()}
        parts.append(net.velocity(batch.x[rows], batch.t[rows], condition))
    return torch.cat(parts)


def draw(latent: Sequence[int], t: float, device: torch.device) -> Batch:
    """Noise at time t, and made-up texts.  latent: (F, H, W)"""
    generator = torch.Generator().manual_seed(1)
    shapes = ((SAMPLES, 16, *latent), (SAMPLES, TEXT, TEXT_WIDTH), (SAMPLES, POOLED))
    x, text, pooled = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return Batch(x, torch.full((SAMPLES,), t, device=device), {"text": text, "pooled": pooled})


def scale_velocity(net: HunyuanVideo, latent: Sequence[int], device: torch.device) -> None:
    """Give the unguided velocity the size that a trained network's has.  latent: (F, H, W)"""
    batch, cfg = draw(latent, 0.5, device), net.cfg
    net.cfg = 1.0
    size = velocities(net, batch, SAMPLES).std()
    net.network.proj_out.weight.mul_(VELOCITY / size)  # type: ignore[operator, union-attr]
    net.cfg = cfg


def compare(
    net: HunyuanVideo, case: Case, step: int, latent: Sequence[int], device: torch.device
) -> Found:
    """One step's transitions as the rollout of `case` draws them and its update sees them."""
    grid = time_grid(STEPS, SHIFT, device)
    batch = draw(latent, grid[step].item(), device)
    emulated, found = device.type == "cpu", []
    for size in (case.rollout, case.update):
        with rounding(kernel_of(case, size) if emulated else 1, case.rounds):
            found.append(velocities(net, batch, size))
    drawn, trained = found
    mean, std = net.transition(batch.x, drawn, grid[step], grid[step + 1], ETA)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)).to(device)
    x_next = mean + std * noise
    old = gaussian_log_prob(x_next, mean, std)
    update_mean, _ = net.transition(batch.x, trained, grid[step], grid[step + 1], ETA)
    new = gaussian_log_prob(x_next, update_mean, std)
    square = ((update_mean - mean) / std).square().mean().item()
    own = gaussian_log_prob(x_next, update_mean, std)
    return Found(
        cfg=net.cfg,
        case=case,
        step=step,
        difference=((trained - drawn).norm() / drawn.norm()).item(),
        bias=0.0 - 0.5 * square,
        outside=((new - old).abs() > CLIP_RANGE).float().mean().item(),
        outside_full=beyond(-0.5 * square, math.sqrt(square / FULL)),
        after=(new - own).abs().max().item(),
    )


def beyond(mean: float, std: float) -> float:
    """The share of a normal distribution outside the clip range."""
    if std == 0.0:
        return float(abs(mean) > CLIP_RANGE)
    low, high = ((bound - mean) / (std * math.sqrt(2)) for bound in (-CLIP_RANGE, CLIP_RANGE))
    return 1.0 - 0.5 * (math.erf(high) - math.erf(low))


def cases(device: torch.device) -> list[Case]:
    """Equal and unequal batch sizes; emulated, also with other rounding in few products."""
    found = [Case(1, 1), Case(2, 2), Case(2, 1), Case(4, 2)]
    return found if device.type == "cuda" else [*found[:1], *found[2:3], Case(2, 1, "rows")]


@torch.no_grad()
def measure(
    width: int, latent: Sequence[int], steps: Sequence[int], device: torch.device
) -> Iterator[Found]:
    """All cases, with guidance 1 and 5.  latent: (F, H, W)"""
    for cfg in (1.0, 5.0):
        net = policy(width, cfg, device)
        scale_velocity(net, latent, device)
        zeros = {"text": torch.zeros(TEXT, TEXT_WIDTH), "pooled": torch.zeros(POOLED)}
        net.negative = {name: part.to(device) for name, part in zeros.items()}
        for case in cases(device):
            for step in steps:
                yield compare(net, case=case, step=step, latent=latent, device=device)


HEAD_BEFORE = "before: old log-probability of the rollout"
HEADS = (
    f"{'':>8} {'batch of':>15} {'':>18} | {HEAD_BEFORE:^48} | after",
    f"{'guidance':>8} {'rollout':>8} {'update':>6} {'other':>5} {'step':>4} {'|dv|/|v|':>8} | "
    f"{'-mean(z^2)/2':>13} {'outside, here':>14} {'outside, full size':>19} | max |log r|",
)


def line(found: Found) -> str:
    """One row of the table."""
    case = found.case
    rounds = "-" if case.rollout == case.update else case.rounds
    return (
        f"{found.cfg:>8g} {case.rollout:>8} {case.update:>6} {rounds:>5} {found.step:>4} "
        f"{found.difference:>8.1e} | {found.bias:>13.1e} {found.outside:>14.0%} "
        f"{found.outside_full:>19.0%} | {found.after:>11.1g}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=int, default=192, help="of the network, a multiple of 32 (default: 192)")
    add("--latent", default="1x16x16", metavar="FxHxW", help="default: 1x16x16")
    add("--steps", default="0,12,23", help=f"of the {STEPS} (default: 0,12,23)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="FILE", help="write the rows to this file")
    asked = parser.parse_args()
    device, begun = torch.device(asked.device), time.perf_counter()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, CPU"
    print(f"{date.today()}, {name}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"20 + 40 blocks, width {asked.width}, latent 16x{asked.latent}, clip range {CLIP_RANGE}")
    kernels = "the device's" if device.type == "cuda" else "emulated where batches differ"
    print(f"{SAMPLES} transitions per row; full size: {FULL:,} values; kernels: {kernels}\n")
    print("\n".join(HEADS), flush=True)
    latent = [int(size) for size in asked.latent.split("x")]
    steps = [int(step) for step in asked.steps.split(",")]
    rows = []
    for found in measure(asked.width, latent, steps, device):
        rows.append(asdict(found))
        print(line(found), flush=True)
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
