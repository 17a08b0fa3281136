"""Stage (c): the bias of the log-ratio in bfloat16, by benchmarks/speed/ratio_bias.py."""

from collections.abc import Sequence

from benchmarks.gpu import measure
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

WIDTH, LATENT, STEPS = 768, (5, 32, 32), (0, 12, 23)
SMALL_WIDTH, SMALL_LATENT, SMALL_STEPS = 64, (1, 4, 4), (23,)


def run(setup: Setup, report: Report) -> None:
    """Report the bias of each case, and the share of transitions outside the clip range."""
    from benchmarks.speed import ratio_bias

    small, where = measure.is_small(setup), measure.device()
    width, latent = (SMALL_WIDTH, SMALL_LATENT) if small else (WIDTH, LATENT)
    steps: Sequence[int] = SMALL_STEPS if small else STEPS
    emulated = where.type == "cpu"
    report.row("width of the network", width, note=f"20 + 40 blocks, latent 16 x {latent}")
    if emulated:
        report.row("kernels", "emulated", note="a CPU rounds alike in any batch")
    for found in ratio_bias.measure(width, latent, steps, where):
        case = found.case
        rounds = f", {case.rounds}" if emulated and case.rollout != case.update else ""
        what = f"cfg {found.cfg:g}, batches {case.rollout}/{case.update}{rounds}, step {found.step}"
        note = f"|dv|/|v| {found.difference:.1e}, outside the clip range {found.outside:.0%}, "
        note += f"at full size {found.outside_full:.0%}; with the update's own: {found.after:g}"
        report.row(what, found.bias, "-mean(z^2)/2", note)
