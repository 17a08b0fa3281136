"""Sections of the report on ranks: peak memory of each phase, and how far apart the ranks were."""

from collections import Counter
from html import escape

import numpy as np

from fastgrpo.run.terminal import PHASES
from fastgrpo.tools.report.charts import Series, curves, level_bars
from fastgrpo.tools.report.html import chart, legend, table
from fastgrpo.tools.report.run_data import Run


def phase_colour(phase: str) -> str:
    """The CSS colour that a phase has on the whole page."""
    return f"t{PHASES.index(phase) + 1}" if phase in PHASES else "t6"


GPU_NOTE = (
    "Full: tensors, the largest peak of any rank in any iteration. Faint: what PyTorch holds "
    "beyond that."
)
HOST_NOTE = (
    "The process&rsquo;s resident memory, the largest peak of any rank; scoring in the background "
    "counts."
)


def memory(run: Run) -> str:
    """The section on memory: the largest peak of any rank in each phase."""
    cards = memory_chart(run, ("allocated", "reserved"), "GPU memory", GPU_NOTE)
    cards += memory_chart(run, ("resident",), "Host memory", HOST_NOTE)
    if not cards:
        return ""
    charts = f'<div class="charts">{cards}</div>'
    return f"<section><h2>Where the memory goes</h2>{charts}</section>"


def memory_chart(run: Run, kinds: tuple[str, ...], title: str, note: str) -> str:
    """A card with a bar per phase; empty where the run has no such numbers."""
    phases = [
        phase for phase in PHASES if all(len(run.values(f"{kind}_gib/{phase}")) for kind in kinds)
    ]
    if not phases:
        return ""
    peaks = np.array(
        [[run.values(f"{kind}_gib/{phase}").max() for kind in kinds] for phase in phases]
    )
    texts = ", ".join(
        f"{phase} {row[-1]:.2f} GiB" for phase, row in zip(phases, peaks, strict=True)
    )
    drawing = level_bars(
        f"{title} by phase: {texts}", phases, [phase_colour(phase) for phase in phases], peaks
    )
    return chart(title, drawing, note)


def ranks(run: Run) -> str:
    """The section on the ranks: a curve and a line of a table for each phase."""
    phases = [phase for phase in PHASES if len(run.values(f"seconds_max/{phase}"))]
    if not phases:
        return ""
    busy = [phase for phase in phases if phase != "wait"]
    behind = [over_median(run, phase) for phase in busy]
    drawing = curves(
        "Seconds that the slowest rank took over the median of the ranks",
        behind,
        from_zero=True,
        axis="seconds",
    )
    cards = chart(
        "The slowest rank over the median", drawing, legend([(phase_colour(p), p) for p in busy])
    )
    if "wait" in phases:
        waits = {
            "median": ("flat", "median"),
            "max": ("down", "who waited longest"),
            "min": ("up", "who waited least"),
        }
        series = [
            run.curve(f"seconds_{kind}/wait", label, colour)
            for kind, (colour, label) in waits.items()
        ]
        drawing = curves(
            "Seconds that ranks waited for others", series, from_zero=True, axis="seconds"
        )
        cards += chart("Waiting for others", drawing, legend([*waits.values()]))
    heads = ["phase", "fastest", "median", "slowest", "slowest most often"]
    rows = [[phase_name(phase), *mean_seconds(run, phase), who(run, phase)] for phase in phases]
    body = table(heads, rows, "Seconds of each phase over ranks")
    note = (
        "Seconds per iteration; in the table, their means. <i>wait</i> is the time for which a "
        "rank had done its part and others had not. In the update, and wherever weights or "
        "sequences are sharded, ranks keep step: all take the time of the slowest."
    )
    spread = f'<div class="card">{body}</div><div class="charts">{cards}</div>'
    return (
        f'<section><h2>How far apart the ranks are</h2><p class="note">{note}</p>{spread}</section>'
    )


def over_median(run: Run, phase: str) -> Series:
    """Seconds of the slowest rank minus the median of the ranks, over iterations."""
    rows = [row for row in run.rows if f"seconds_max/{phase}" in row]
    over = [row[f"seconds_max/{phase}"] - row[f"seconds_median/{phase}"] for row in rows]
    return Series(
        phase,
        phase_colour(phase),
        np.array([row["iteration"] + 1.0 for row in rows]),
        np.array(over),
    )


def phase_name(phase: str) -> str:
    """A phase with its swatch, as HTML."""
    return f'<span class="s-{phase_colour(phase)}"><i class="swatch"></i>{escape(phase)}</span>'


def mean_seconds(run: Run, phase: str) -> list[str]:
    """The means over iterations of the ranks' minimum, median and maximum."""
    return [
        f"{run.values(f'seconds_{kind}/{phase}').mean():.2f} s" for kind in ("min", "median", "max")
    ]


def who(run: Run, phase: str) -> str:
    """`rank 5 (n1), 87 %`: the rank that was slowest in most iterations, and their share."""
    counted = Counter(int(rank) for rank in run.values(f"slowest/{phase}"))
    if not counted:
        return ""
    rank, times = counted.most_common(1)[0]
    host = f" ({escape(run.hosts[rank])})" if rank in run.hosts else ""
    return f"rank {rank}{host}, {times / counted.total():.0%}"
