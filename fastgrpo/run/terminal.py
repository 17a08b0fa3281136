"""Display of a run in the terminal: a plain line per iteration, or a live dashboard.

Pure functions but `open_console`.
rows: the lines of metrics.jsonl so far, as mappings from name to number; iterations count from 0.
"""

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fastgrpo.run.output import Output, printable

Row = Mapping[str, float]

PHASES = ("rollout", "decode", "reward", "update", "wait")
PHASE_COLOURS = {
    "rollout": "blue",
    "decode": "cyan",
    "reward": "yellow",
    "update": "magenta",
    "wait": "white",
}
BLOCKS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 32  # characters
WINDOW = 5  # iterations averaged at both ends, because each iteration has other prompts
RECENT = 10  # iterations that the time left is estimated from


class _Console(Console):
    """rich's console, with the control characters of what it shows escaped, and its own kept."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before widths are measured, so that a table has room for it."""
        return super().render_str(printable(text), **options)


def open_console(width: int | None = None, markup: bool = True) -> Console:
    """A console on standard output.

    width: in columns; None: the terminal's;  markup: whether [bold] in a text is style
    """
    stream = sys.stdout
    file = stream.raw if isinstance(stream, Output) else stream
    return _Console(file=file, width=width, markup=markup)  # type: ignore[arg-type]


def parts(names: Sequence[str] | Row, prefix: str = "reward/") -> list[str]:
    """The reward's parts among names of metrics, e.g. VQ, MQ, TA, in order of appearance."""
    every = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return [part for part in every if part not in ("sum", "invalid")]


def duration(seconds: float) -> str:
    """`45 s`, `9 min`, `2 h 05 min`, `3 d 4 h`; `?` for a number that is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def seconds_left(rows: Sequence[Row], total: int) -> float:
    """Iterations left times the mean seconds/total of the last ten.

    NaN when nothing was timed yet.
    """
    recent = rows[-3 * RECENT :]
    times = [row["seconds/total"] for row in recent if "seconds/total" in row][-RECENT:]
    if not times:
        return math.nan
    return sum(times) / len(times) * max(0, total - 1 - int(rows[-1]["iteration"]))


def plain_line(rows: Sequence[Row], total: int, note: str = "") -> str:
    """The last row as one line.

    `iteration 12/90  reward 2.113 (VQ 0.71 ...)  8.1 s (rollout 2.0 ...)  eta 9 min`
    note: what else is worth saying, at the line's end
    """
    row = rows[-1]
    if "heldout/sum" in row:
        return f"iteration {row['iteration'] + 1:.0f}/{total}  " + _held_out(row)
    if "reward/sum" not in row:
        return f"iteration {row['iteration'] + 1:.0f}/{total}  " + _others(row)
    scores = " ".join(f"{part} {row[f'reward/{part}']:.2f}" for part in parts(row))
    phases = " ".join(f"{phase} {row[f'seconds/{phase}']:.1f}" for phase in _timed(row))
    line = (
        f"iteration {row['iteration'] + 1:.0f}/{total}  reward {row['reward/sum']:.3f} ({scores})"
    )
    if "seconds/total" in row:
        line += (
            f"  {row['seconds/total']:.1f} s ({phases})  eta {duration(seconds_left(rows, total))}"
        )
    if row.get("reward/invalid", 0) > 0:
        line += f"  invalid scores: {row['reward/invalid']:.0f}"
    return f"{line}  {note}" if note else line


def _timed(row: Row) -> list[str]:
    """The phases to show: those that were timed, and waiting only where there was some."""
    timed = [phase for phase in PHASES if f"seconds/{phase}" in row]
    return [phase for phase in timed if phase != "wait" or row["seconds/wait"] >= 0.05]


def _held_out(row: Row) -> str:
    """An evaluation on the way: `held-out 1.94 (+0.05, +0.01 .. +0.12)  VQ 0.55 ... sharpness 129`.

    In brackets the change since before training and its 95 % interval.
    """
    change, low, high = (row[f"heldout_{name}/sum"] for name in ("change", "low", "high"))
    scores = " ".join(f"{part} {row[f'heldout/{part}']:.3g}" for part in parts(row, "heldout/"))
    return f"held-out {row['heldout/sum']:.3f} ({change:+.3f}, {low:+.3f} .. {high:+.3f})  {scores}"


def _others(row: Row) -> str:
    """Metrics that are not an iteration's: `group name 2.2 other 0.8`."""
    groups: dict[str, list[str]] = {}
    for name, value in row.items():
        if name not in ("iteration", "time"):
            group, _, rest = name.rpartition("/")
            groups.setdefault(group, []).append(f"{rest} {value:.4g}")
    return "  ".join(f"{group} {' '.join(values)}".strip() for group, values in groups.items())


def dashboard(rows: Sequence[Row], total: int, title: str, note: str = "") -> RenderableType:
    """The live display: progress, rewards with their trends, health of the update, seconds.

    note: what else is worth saying of the last iteration, below all
    """
    trained = [row for row in rows if "reward/sum" in row]
    if not trained:
        waiting = Text(f"iteration 1/{total} is under way", style="dim")
        return Panel(waiting, title=Text(title), title_align="left", border_style="dim")
    last = trained[-1]
    upper: list[RenderableType] = [
        _progress(trained, total),
        Text(),
        _rewards(trained),
        Text(),
        _health(last),
    ]
    notes: list[RenderableType] = [Text(note, style="yellow")] if note else []
    body = Group(*upper, _times(last), *notes)
    return Panel(body, title=Text(title, style="bold"), title_align="left", border_style="dim")


def _progress(rows: Sequence[Row], total: int) -> Table:
    done = int(rows[-1]["iteration"]) + 1
    line = Table.grid(padding=(0, 2))
    spent = duration(sum(row.get("seconds/total", 0.0) for row in rows))
    bar = ProgressBar(total=total, completed=done, width=30)
    left = duration(seconds_left(rows, total)) if done < total else "none, done"
    line.add_row(
        f"iteration [bold]{done}/{total}[/bold]",
        bar,
        f"[dim]spent[/dim] {spent}",
        f"[dim]left[/dim] {left}",
    )
    return line


def _rewards(rows: Sequence[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=7)
    table.add_column(justify="right", min_width=8)
    table.add_column(justify="right", min_width=8)
    table.add_column()
    table.add_row(
        *(Text(head, style="dim") for head in ("reward", "now", "change", "since the start"))
    )
    for part in ("sum", *parts(rows[-1])):
        values = [
            row[f"reward/{part}"]
            for row in rows
            if math.isfinite(row.get(f"reward/{part}", math.nan))
        ]
        if not values:
            table.add_row(part, "none", "", "no valid score yet")
            continue
        change = _change(values)
        style = "green" if change > 0 else "red" if change < 0 else "dim"
        now = Text(f"{values[-1]:.3f}", style="bold" if part == "sum" else "")
        table.add_row(
            part,
            now,
            Text(f"{change:+.3f}", style=style),
            Text(trend(values, TREND_WIDTH), style=style),
        )
    return table


def _change(values: Sequence[float]) -> float:
    """Mean of the last WINDOW iterations minus mean of the first; never overlapping."""
    window = max(1, min(WINDOW, len(values) // 2))
    return sum(values[-window:]) / window - sum(values[:window]) / window


def trend(values: Sequence[float], width: int) -> str:
    """The values as a line of at most `width` block characters, each the mean of a stretch."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[min(7, int(8 * (mean - low) / span))] for mean in means)


def _health(row: Row) -> Table:
    line = Table.grid(padding=(0, 2))
    shown = {
        "max |log ratio|": ("update/max_log_ratio_first", "{:.1e}"),
        "grad norm": ("update/grad_norm", "{:.3g}"),
        "clipped": ("update/clip_fraction", "{:.1%}"),
        "invalid": ("reward/invalid", "{:.0f}"),
    }
    cells = [
        f"[dim]{label}[/dim] {form.format(row[name])}"
        for label, (name, form) in shown.items()
        if name in row
    ]
    line.add_row(*cells)
    return line


def _times(row: Row) -> Table:
    line = Table.grid(padding=(0, 2))
    cells = [
        f"[{PHASE_COLOURS[phase]}]■[/] [dim]{phase}[/dim] {row[f'seconds/{phase}']:.1f} s"
        for phase in _timed(row)
    ]
    if "seconds/total" in row:
        cells.append(
            f"[dim]iteration[/dim] {row['seconds/total']:.1f} s at "
            f"{time.strftime('%H:%M:%S', _clock(row))}"
        )
    line.add_row(*cells)
    return line


def _clock(row: Row) -> time.struct_time:
    return time.localtime(row.get("time", 0.0))
