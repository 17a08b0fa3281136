"""Stage (e): the whole HunyuanVideo, 12.8 B parameters, in bfloat16 on one card, beside the plan.

Weights are random, made without memory and put on the card. Evaluations, decoding and a LoRA
update are of the clip of launch/t2v_hunyuan.toml, 53 x 480 x 480; a full update does not fit one
card, hence adapters of rank 32.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.gpu import hunyuan, measure
from benchmarks.gpu.hunyuan import Size
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

RANK = 32
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
SMALL_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
CLIP = (53, 480, 480)  # frames, height, width


@dataclass(frozen=True)
class Planned:
    """What the plan says of an evaluation, a decoded clip and a micro-batch of the update."""

    forward_flops: float
    update_flops: float
    decode_flops: float
    rollout_gib: float
    update_gib: float
    seconds: dict[
        str, float
    ]  # with the plan's own peak and shares; empty for a card not in its table


@dataclass(frozen=True)
class Against:
    """What measured seconds are compared with."""

    plan: Planned | None  # None: fastgrpo's plan could not be made
    peak: float  # 10^12 FLOPs per second, measured

    def share(self, flops: float, taken: float) -> float:
        """The share of the measured peak."""
        return flops / taken / 1e12 / self.peak

    def note(self, what: str, flops: float, taken: float) -> str:
        """That share, and the plan's seconds."""
        if self.plan is None or not flops:
            return ""
        expected = self.plan.seconds.get(what)
        told = f"; planned {expected:.2f} s" if expected else ""
        return f"{self.share(flops, taken):.1%} of the measured peak{told}"


class Adapted(nn.Module):
    """A frozen linear layer and an adapter, whose float32 weights are cast as by FSDP2."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        make: Any = {"device": base.weight.device, "dtype": torch.float32}
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(
            torch.randn(RANK, base.in_features, **make) * base.in_features**-0.5
        )
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK, **make))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in];  returns [..., out]"""
        low = nn.functional.linear(x, self.down.to(x.dtype))
        found: Tensor = self.base(x) + nn.functional.linear(low, self.up.to(x.dtype))
        return found


def run(setup: Setup, report: Report) -> None:
    """Measure evaluations, decoding and the update; calibrate the plan's shares."""
    where, size = measure.device(), hunyuan.size(measure.is_small(setup))
    plan = None
    with report.attempt("the plan's figures"):
        plan = planned(size, where, measure.is_small(setup))
    against = Against(plan, measure.peak_tflops(setup))
    with report.attempt("VAE"):
        _decode(setup, report, against)
    measure.free(where)
    network = hunyuan.network(size, where)
    hunyuan.drop_masks(network)
    count = sum(parameter.numel() for parameter in network.parameters())
    report.row("parameters", count / 1e9, "10^9", f"{size.tokens:,} tokens")
    with report.attempt("evaluation"):
        _evaluate(network, size, report, against)
    measure.free(where)
    with report.attempt("LoRA update"):
        _update(network, size, report, against)


def planned(size: Size, where: torch.device, small: bool) -> Planned:
    """The plan's closed forms for this network on one GPU, with adapters."""
    from benchmarks.plan.check import job
    from fastgrpo.core import config
    from fastgrpo.models.hunyuan_video import AUXILIARY
    from fastgrpo.tools.plan.costs import compute, memory
    from fastgrpo.tools.plan.gpus import GPUS, Achieved
    from fastgrpo.tools.plan.phases import Machine

    overrides = [f"lora.rank={RANK}", "rollout.batch_size=1", "distributed.shard=1"]
    recipe = config.load(ROOT / "launch" / "t2v_hunyuan.toml", overrides)
    latent = (16, *size.latent)
    of = job(recipe, settings=size.config, latent=latent, text=size.text, gpus=1)
    forward, update = compute.forward(of, 1).total, compute.update(of, 1).total
    decode = 0.0 if small else AUXILIARY.decode_flops * tiled_pixels()
    name = torch.cuda.get_device_name().lower() if where.type == "cuda" else ""
    card = next((card for card in GPUS if all(part in name for part in card.name.split("-"))), None)
    seconds = {}
    if card is not None:
        machine, achieved = Machine(card, Achieved()), Achieved()
        seconds = {
            "evaluation": machine.compute(forward, achieved.rollout),
            "update": machine.compute(update, achieved.update),
            "decode": machine.compute(decode, achieved.decode),
        }
    return Planned(
        forward_flops=forward,
        update_flops=update,
        decode_flops=decode,
        rollout_gib=_alone(memory.rollout(of, 1, True)),
        update_gib=_alone(memory.update(of, 1, False)),
        seconds=seconds,
    )


def _alone(parts: dict[str, float]) -> float:
    """GiB of a plan's memory without what FSDP2 gathers: the network here is whole as it is."""
    return sum(size for name, size in parts.items() if not name.startswith("gathered")) / 2**30


def tiled_pixels() -> int:
    """Pixels that the published VAE's tiles of the clip cover, overlaps counted twice."""
    from fastgrpo.models.hunyuan_video import AUXILIARY

    assert AUXILIARY.tile is not None
    axes = zip(CLIP, AUXILIARY.tile, AUXILIARY.stride, strict=True)
    covered = (
        sum(min(tile, n - start) for start in range(0, n, stride)) for n, tile, stride in axes
    )
    return math.prod(covered)


def _evaluate(network: Any, size: Size, report: Report, against: Against) -> None:
    """Forwards without gradients, for one sample and for two."""
    plan = against.plan
    where = next(network.parameters()).device
    for batch in (1, 2):
        keywords = hunyuan.inputs(size, batch, where, torch.bfloat16)

        @torch.no_grad()
        def work(keywords: dict[str, Any] = keywords) -> None:
            network(**keywords)

        with report.attempt(f"evaluation of {batch}"):
            taken = measure.seconds(work, where) / batch
            flops = plan.forward_flops if plan else 0.0
            note = against.note("evaluation", flops, taken)
            report.row(f"an evaluation, {batch} at once", taken, "s", note)
            if plan and batch == 1:
                report.calibrate(rollout=against.share(flops, taken))
                _memory(report, "evaluation", measure.peak_gib(work, where), plan.rollout_gib)


def _memory(report: Report, what: str, gib: float, expected: float | None) -> None:
    """Report a peak, where there is a GPU, beside the plan's."""
    note = "" if expected is None else f"planned {expected:.2f} GiB"
    if math.isnan(gib):
        report.row(f"{what}, peak memory", None, "GiB", "; ".join(filter(None, ["no GPU", note])))
    else:
        report.row(f"{what}, peak memory", gib, "GiB", note)


def _decode(setup: Setup, report: Report, against: Against) -> None:
    """One clip through the VAE in bfloat16, in its tiles."""
    from diffusers import AutoencoderKLHunyuanVideo

    plan = against.plan
    where, small = measure.device(), measure.is_small(setup)
    with torch.device("meta"):
        vae: Any = AutoencoderKLHunyuanVideo(**(SMALL_VAE if small else {}))
    nn.Module.to(vae, torch.bfloat16)
    hunyuan.randomize(vae.to_empty(device=where))
    vae.enable_tiling()
    latent = hunyuan.SMALL_LATENT if small else hunyuan.LATENT
    z = torch.randn(1, 16, *latent, device=where, dtype=torch.bfloat16)

    @torch.no_grad()
    def work() -> None:
        vae.decode(z).sample.float().clamp(-1, 1)

    taken = measure.seconds(work, where)
    flops = plan.decode_flops if plan else 0.0
    note = against.note("decode", flops, taken)
    report.row("a clip decoded in tiles", taken, "s", note)
    if flops:
        report.calibrate(decode=against.share(flops, taken))
    _memory(report, "decoding", measure.peak_gib(work, where), None)


def adapt(network: nn.Module) -> list[nn.Parameter]:
    """Freeze a network and put adapters beside its attention.  returns their parameters"""
    network.requires_grad_(False)
    named = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ATTENTION) and "refiner" not in name
    ]
    for name, module in named:
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, Adapted(module))
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _update(network: Any, size: Size, report: Report, against: Against) -> None:
    """Forward, backward with recomputation, clipping and AdamW of adapters, one sample."""
    plan = against.plan
    where = next(network.parameters()).device
    trained = adapt(network)
    network.train()
    network.enable_gradient_checkpointing()
    keywords = hunyuan.inputs(size, 1, where, torch.bfloat16)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=where.type == "cuda")

    def work() -> None:
        (v,) = network(**keywords)
        v.float().square().mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    taken = measure.seconds(work, where)
    flops = plan.update_flops if plan else 0.0
    note = against.note("update", flops, taken)
    count = sum(parameter.numel() for parameter in trained)
    report.row(f"a LoRA update, rank {RANK}, {count / 1e6:.1f} M trained", taken, "s", note)
    if plan:
        report.calibrate(update=against.share(flops, taken))
    _memory(report, "LoRA update", measure.peak_gib(work, where), plan.update_gib if plan else None)
