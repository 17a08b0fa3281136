"""A plan as tables on a terminal, as JSON, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgrpo.core.units import GIB
from fastgrpo.run.terminal import open_console
from fastgrpo.tools.plan import phases
from fastgrpo.tools.plan.costs import disk, host, text_encoders
from fastgrpo.tools.plan.gpus import Achieved
from fastgrpo.tools.plan.phases import encoding_seconds, text_encoders_of
from fastgrpo.tools.plan.planner import Plan, Scaled, warnings
from fastgrpo.tools.plan.tuning.answer import Answer
from fastgrpo.tools.plan.tuning.search import MARGIN, Tuned

KINDS = (  # of memory, in the order in which the picture stacks them
    "weights",
    "optimizer",
    "average",
    "raw weights",
    "initial policy",
    "gradients",
    "gathered",
    "gathered ahead",
    "reduced",
    "activations",
    "trajectories",
    "velocities",
    "decoder's graph",
    "VAE",
    "rewards",
    "text encoders",
)


def show(
    found: Plan, plans: Sequence[Scaled], answer: Answer | None, simulated: dict[str, Any] | None
) -> None:
    """Print all of it."""
    console = open_console()
    job = found.subject.job
    mesh = f"{job.replicas} replicas x {job.shards} shards" + (
        f", sp {job.sp}" if job.sp > 1 else ""
    )
    title = (
        f"{job.network.parameters / 1e9:,.2f} B parameters, {job.video:,} video and {job.text} "
        "text tokens on "
        f"{job.gpus} x {found.machine.card.name} ({mesh})"
    )
    console.print(title, highlight=False, soft_wrap=True)
    console.print(_phases(found))
    console.print(_memory(found))
    told = [
        verdict(found),
        encoders_line(found),
        host_line(found),
        disk_line(found),
        nvme_line(found),
    ]
    lines = [*told, *(f"note: {line}" for line in warnings(found))]
    for line in filter(None, lines):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if simulated:
        console.print(_simulated(simulated))
        if simulated["left_out"]:
            left_out = " and ".join(simulated["left_out"])
            line = f"both without {left_out}, of which a simulated rank has none"
            console.print(line, highlight=False, soft_wrap=True)
    if answer is not None:
        _answer(console, found, answer)
    console.print(_curve(plans))
    for one in plans:
        if one.refused:
            line = f"on {one.gpus} a run would refuse it: {one.refused}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    assumed = _assumed(found.machine.achieved)
    line = f"of the GPUs, assumed where no --set or --calibration says otherwise: {assumed}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def verdict(found: Plan) -> str:
    """Whether it fits, and what a run takes."""
    usable, worst = found.machine.usable() / GIB, found.worst
    room = f"{worst.peak / GIB:.1f} GiB at the peak ({worst.name}), "
    room += f"{usable:.1f} usable of {found.machine.card.name}"
    if not found.fits_host:
        held, node = sum(found.host.values()) / GIB, found.machine.ram_gib
        room += f"; {held:,.0f} GiB of the host's memory, of which a node has {node:,.0f}"
    if not found.fits:
        return f"does not fit: {room}"
    hours = found.seconds * found.iterations / 3600
    return (
        f"fits: {room}; {brief(found.seconds)} s per iteration, {found.iterations} iterations in "
        f"{brief(hours, 1)} h, "
        f"{brief(found.gpu_hours)} GPU-hours"
    )


def _phases(found: Plan) -> Table:
    table = Table(title="one iteration of the busiest rank")
    for column in ("phase", "peak GiB", "TFLOP", "NVLink GB", "network GB", "seconds"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    once = {"load": " (once)", "save": f" (every {found.every})"}
    for phase in found.phases:
        table.add_row(
            phase.name + once.get(phase.name, ""),
            f"{phase.peak / GIB:.2f}",
            f"{phase.flops / 1e12:,.0f}",
            f"{phase.link / 1e9:,.1f}",
            f"{phase.network / 1e9:,.1f}",
            f"{phase.seconds:,.1f}",
        )
    return table


def _memory(found: Plan) -> Table:
    """What the peaks are made of; kinds that are nowhere worth a line are left out."""
    table = Table(title="GiB of these peaks")
    table.add_column("")
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    for kind in KINDS:
        sizes = [phase.memory.get(kind, 0.0) / GIB for phase in found.phases]
        if max(sizes) >= 0.005:
            table.add_row(kind, *(f"{size:.2f}" if size >= 0.005 else "" for size in sizes))
    return table


def _answer(console: Console, found: Plan, answer: Answer) -> None:
    """The tuned recipe and the ways to another, as lines to add to the command."""

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if answer.tuned is None:
        tell(f"nothing with the same results fits with {MARGIN:.0%} of the memory left")
    else:
        tell(
            f"tuned, with the same results: {_figures(answer.tuned.plan)}; as it is: {_figures(found)}"
        )
        _overrides(console, answer.tuned)
    if answer.adapters is not None:
        tell(f"tuned with adapters, another algorithm: {_figures(answer.adapters.tuned.plan)}")
        tell(f"  {' '.join(answer.adapters.overrides)}")
    if answer.alternatives:
        tell("with other results these fit, tuned, the least given up first:")
    for one in answer.alternatives:
        tell(f"  {' '.join(one.overrides)}    # {_figures(one.tuned.plan)}")
    if answer.tuned is None and not answer.alternatives:
        tell("nothing near it fits on these GPUs: use more of them, or larger ones")


def _overrides(console: Console, tuned: Tuned) -> None:
    """What each override wins, and all of them in one line."""
    if not tuned.wins:
        console.print("  it is the quickest already", highlight=False)
        return
    table = Table(title="what each override wins: the plan without it")
    table.add_column("override", no_wrap=True)
    for column in ("s per iteration", "peak GiB", "fits"):
        table.add_column(column, justify="right")
    for win in tuned.wins:
        table.add_row(
            win.override,
            f"{win.seconds:+,.1f}",
            f"{win.memory / GIB:+,.1f}",
            "no" if win.needed else "yes",
        )
    console.print(table)
    line = f"  {' '.join(tuned.overrides)}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _figures(plan: Plan) -> str:
    """Seconds and memory of a plan in a few words."""
    figures = f"{brief(plan.seconds)} s per iteration, {plan.worst.peak / GIB:.1f} GiB"
    held = sum(plan.host.values()) / GIB
    return f"{figures}, and {held:,.0f} GiB of the host's per node" if held >= 0.5 else figures


def brief(value: float, digits: int = 0) -> str:
    """A figure with so many decimals, or with two digits where that would be a naught."""
    text = f"{value:,.{digits}f}"
    return text if float(text.replace(",", "")) else f"{value:.2g}"


def host_line(found: Plan) -> str:
    """What the run holds in the hosts' memory; empty: next to nothing."""
    total = sum(found.host.values()) / GIB
    if total < 0.5:
        return ""
    kinds = ", ".join(f"{kind} {size / GIB:,.1f}" for kind, size in found.host.items())
    return (
        f"host memory: {total:,.1f} GiB per node ({kinds}), pinned blocks rounded up to powers of "
        "two; libraries and files that are read come on top"
    )


def encoders_line(found: Plan) -> str:
    """How the text encoders lie on the GPUs, what that takes, and how long prompts take."""
    placed = text_encoders_of(found.subject, found.machine)
    return text_encoders.summary(placed, encoding_seconds(found.subject, found.machine))


def disk_line(found: Plan) -> str:
    """What the run needs on its disks."""
    needed = disk.of_run(found.subject)
    kept = found.subject.job.recipe.checkpoint.keep
    return (
        f"disk: {needed['checkpoints'] / GIB:,.1f} GiB of checkpoints ({kept} kept, the best, and "
        f"one that is written), {needed['weights'] / GIB:,.1f} GiB of the model's files in bfloat16"
    )


def nvme_line(found: Plan) -> str:
    """What lies on each node's NVMe, and what that takes and saves; empty: nothing."""
    job, machine = found.subject.job, found.machine
    kinds = host.on_nvme(job)
    if not kinds:
        return ""
    taken = ", ".join(f"{kind} {size / GIB:,.1f}" for kind, size in kinds.items())
    steps = job.recipe.optimizer.updates_per_iteration
    update = next(phase.seconds for phase in found.phases if phase.name == "update")
    return (
        f"NVMe: {sum(kinds.values()) / GIB:,.1f} GiB per node ({taken}), and "
        f"{host.saved_by_nvme(job) / GIB:,.1f} GiB less of the host's memory than "
        f"distributed.offload=true; of the update's {brief(update, 1)} s the disk reads and writes "
        f"for {brief(steps * phases.nvme_seconds(job, machine), 1)} s, at {machine.nvme_gbs:g} GB/s "
        "(--disk-gbs)"
    )


def _curve(plans: Sequence[Scaled]) -> Table:
    table = Table(title="the same recipe on other numbers of GPUs")
    for column in (
        "GPUs",
        "s per iteration",
        "hours per run",
        "GPU-hours per run",
        "peak GiB",
        "fits",
    ):
        table.add_column(column, justify="right")
    for one in plans:
        if one.plan is not None:
            table.add_row(
                one.label,
                brief(one.plan.seconds),
                brief(one.plan.gpu_hours / one.gpus, 1),
                brief(one.plan.gpu_hours),
                f"{one.plan.worst.peak / GIB:.1f}",
                "yes" if one.plan.fits else "no",
            )
    return table


def _simulated(simulated: dict[str, Any]) -> Table:
    table = Table(
        title="one micro-batch of the update and one forward of the rollout, simulated and in "
        "closed form"
    )
    for column in ("", "simulated", "closed form", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name, (exact, closed) in simulated["compared"].items():
        difference = f"{(closed - exact) / exact:+.1%}" if exact else ""
        table.add_row(name, f"{exact:,.3f}", f"{closed:,.3f}", difference)
    return table


def _assumed(achieved: Achieved) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in vars(achieved).items())


def as_json(
    found: Plan, plans: Sequence[Scaled], answer: Answer | None, simulated: dict[str, Any] | None
) -> dict[str, Any]:
    """All of it; memory in bytes, seconds, FLOPs."""
    job = found.subject.job
    return {
        "fits": found.fits,
        "verdict": verdict(found),
        "gpus": job.gpus,
        "gpu": vars(found.machine.card),
        "achieved": vars(found.machine.achieved),
        "mesh": {"replicas": job.replicas, "shards": job.shards, "sp": job.sp},
        "parameters": job.network.parameters,
        "tokens": {"video": job.video, "text": job.text},
        "usable_bytes": found.machine.usable(),
        "host_bytes_per_node": found.host,
        "disk_bytes": disk.of_run(found.subject),
        "text_encoders": [
            {"part": one.text.name, "way": one.way, "peak": sum(one.memory.values())}
            for one in text_encoders_of(found.subject, found.machine)
        ],
        "encoding_seconds_per_1000_prompts": encoding_seconds(found.subject, found.machine),
        "nvme_bytes_per_node": host.on_nvme(job),
        "nvme_seconds_per_step": phases.nvme_seconds(job, found.machine),
        "phases": [vars(phase) | {"peak": phase.peak} for phase in found.phases],
        "seconds_per_iteration": found.seconds,
        "gpu_hours": found.gpu_hours,
        "notes": warnings(found),
        "tuned": answer and answer.tuned and _tuned_json(answer.tuned, answer.tuned.overrides),
        "tuned_with_adapters": answer
        and answer.adapters
        and _tuned_json(answer.adapters.tuned, answer.adapters.overrides),
        "alternatives": [
            _tuned_json(one.tuned, one.overrides) for one in (answer.alternatives if answer else ())
        ],
        "curve": [_scaled_json(one) for one in plans],
        "simulated": simulated,
    }


def _scaled_json(one: Scaled) -> dict[str, Any]:
    found = one.plan
    return {
        "gpus": one.gpus,
        "overrides": [one.override] if one.override else [],
        "refused": one.refused or None,
        "seconds_per_iteration": found and found.seconds,
        "gpu_hours": found and found.gpu_hours,
        "fits": found is not None and found.fits,
    }


def _tuned_json(tuned: Tuned, overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "overrides": list(overrides),
        "seconds_per_iteration": tuned.plan.seconds,
        "peak": tuned.plan.worst.peak,
        "host_bytes_per_node": sum(tuned.plan.host.values()),
        "wins": [vars(win) for win in tuned.wins],
    }


def picture(found: Plan, file: Path) -> None:
    """Memory of each phase, stacked by kind, beside the phases' seconds, as a PNG, PDF or SVG by
    the file's name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    job, card = found.subject.job, found.machine.card
    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = [phase.name for phase in found.phases]
    bottom = [0.0] * len(names)
    colours = pyplot.get_cmap("tab20")
    for number, kind in enumerate(KINDS):
        sizes = [phase.memory.get(kind, 0.0) / GIB for phase in found.phases]
        if max(sizes) > 0.002 * card.memory_gib:
            memory.bar(names, sizes, bottom=bottom, label=kind, color=colours(number))
            bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    memory.axhline(found.machine.usable() / GIB, color="black", linestyle="--", label="usable")
    memory.axhline(card.memory_gib, color="red", linewidth=1, label=f"{card.name}'s memory")
    memory.set(ylabel="GiB per GPU", title="peak memory")
    memory.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    shares = [
        phase.seconds / (found.every if phase.name == "save" else 1) for phase in found.phases[1:]
    ]
    bars = seconds.barh(names[1:][::-1], shares[::-1], color="tab:blue")
    seconds.bar_label(bars, labels=[f"{value:,.1f} s" for value in shares[::-1]], padding=3)
    seconds.set(xlabel="seconds per iteration", title=f"{brief(found.seconds)} s per iteration")
    seconds.margins(x=0.18)
    fits = "fits" if found.fits else "does not fit"
    figure.suptitle(
        f"{job.recipe.model.family}, {job.video:,} video tokens, {job.gpus} x {card.name}: {fits}"
    )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
