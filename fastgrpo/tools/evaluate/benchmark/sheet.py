"""A benchmark's result in the form of the paper's tables: Markdown, JSON and the terminal."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fastgrpo.tools.evaluate.benchmark.choosing import Unknown
from fastgrpo.tools.evaluate.benchmark.estimates import Estimate, Estimates, Measured
from fastgrpo.tools.evaluate.benchmark.protocols import NOT_STATED, PROTOCOLS, Protocol
from fastgrpo.tools.sample.source import Source
from fastgrpo.tools.score import score
from fastgrpo.training.evaluation import RESAMPLES

UNMEASURED = "not measured"
STAND_IN = "stand-in"
DIFFERENCE, INTERVAL = "difference", "95 % interval"
PAPER = "paper: "


@dataclass(frozen=True)
class Setting:
    """A setting of the protocol, its value here, and who states it; "" where the paper does not."""

    name: str
    value: str
    said_by: str


@dataclass(frozen=True)
class Taken:
    """The judge of a column."""

    note: str
    stands_in: bool


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A benchmark of one run."""

    name: str
    labels: tuple[str, str]
    """The two sides."""
    columns: Mapping[str, Measured | Unknown]
    judges: Mapping[str, Taken]
    settings: Sequence[Setting]
    clips: Mapping[str, Sequence[Mapping[str, Any]]]
    method: str
    """objective.kind of the run's recipe."""

    @property
    def protocol(self) -> Protocol:
        """What was asked for."""
        return PROTOCOLS[self.name]

    def rows(self) -> list[list[str]]:
        """The table as text, the heading first: both sides, difference, interval, the paper."""
        cells = [_cells(column) for column in self.columns.values()]
        labels = [*self.labels, DIFFERENCE, INTERVAL]
        found = [["", *map(self.heading, self.columns)]]
        found += [[label, *(cell[n] for cell in cells)] for n, label in enumerate(labels)]
        for row, numbers in self.protocol.paper.items():
            stated = [f"{numbers[name]}" if name in numbers else "" for name in self.columns]
            found.append([PAPER + row, *stated])
        return found

    def heading(self, name: str) -> str:
        """A column's heading, which says where another judge stands in."""
        taken = self.judges.get(name)
        return f"{name} ({STAND_IN})" if taken is not None and taken.stands_in else name

    def task_rows(self) -> list[list[str]]:
        """Each column with tasks or styles, one row a task and one for all, with their intervals."""
        found = []
        for name, column in self.columns.items():
            if not isinstance(column, Measured) or not column.groups:
                continue
            for group, own in {**column.groups, "overall": column.overall}.items():
                found.append([f"{name}: {group}", *_with_intervals(own), str(own.prompts)])
        heading = ["", *self.labels, DIFFERENCE, "prompts"]
        return [heading, *found] if found else []

    def notes(self) -> list[str]:
        """What the reader must know beside the numbers."""
        lines = []
        for name, column in self.columns.items():
            if isinstance(column, Unknown):
                lines.append(f"{name}: {UNMEASURED}: {column.reason}")
                continue
            lines.append(f"{name}: judged by {self.judges[name].note}")
            if column.missing:
                lines.append(f"{name}: {column.missing} images without a score on both sides")
            for what, (base, trained) in column.also.items():
                lines.append(f"{name}, {what}: {base:.4f} base, {trained:.4f} trained")
        for setting in self.settings:
            lines.append(f"{setting.name}: {setting.value} ({setting.said_by or NOT_STATED})")
        lines.append(
            "rows of the paper: its numbers, made with settings that it does not state in full; a "
            "blank is a number that it does not give"
        )
        lines.append(
            f"intervals: 95 %, {RESAMPLES:,} resamples of the prompts within their task "
            f"({NOT_STATED}, which gives none)"
        )
        return lines

    def markdown(self) -> str:
        """The tables and the notes."""
        parts = [f"**{self.protocol.title}**", "", *markdown_table(self.rows())]
        if tasks := self.task_rows():
            parts += ["", *markdown_table(tasks)]
        return "\n".join([*parts, "", *(f"- {line}" for line in self.notes()), ""])

    def show(self) -> None:
        """Print the tables and the notes."""
        console = score.console()
        console.print(self.protocol.title, highlight=False)
        for rows in filter(None, (self.rows(), self.task_rows())):
            heading, *body = rows
            table = Table()
            for name in heading:
                table.add_column(name, justify="right" if name else "left")
            for row in body:
                table.add_row(*row)
            console.print(table)
        for line in self.notes():
            console.print(line, soft_wrap=True, highlight=False)

    def to_json(self) -> str:
        """Everything; a number that is not known is null, and `unknown` says why."""
        content = {
            "benchmark": self.name,
            "title": self.protocol.title,
            "weights": {"base": self.labels[0], "trained": self.labels[1]},
            "method": self.method,
            "columns": {name: self._column(name, one) for name, one in self.columns.items()},
            "paper": self.protocol.paper,
            "settings": [asdict(one) | {"stated": bool(one.said_by)} for one in self.settings],
            "clips": self.clips,
        }
        return json.dumps(without_nan(content), indent=1, ensure_ascii=False) + "\n"

    def _column(self, name: str, column: Measured | Unknown) -> dict[str, Any]:
        if isinstance(column, Unknown):
            return {"unknown": column.reason, "overall": None}
        return {"judge": self.judges[name].note, "stand_in": self.judges[name].stands_in} | asdict(
            column
        )


def without_nan(value: Any) -> Any:
    """The value with None for floats that are not finite, as JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(own) for own in value]
    return value


def number(value: float, signed: bool = False) -> str:
    """A mean with the paper's digits; a dash where there is none."""
    if not math.isfinite(value):
        return "-"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _interval(estimate: Estimate, signed: bool) -> str:
    if not math.isfinite(estimate.low):
        return "-"
    return f"{number(estimate.low, signed)} .. {number(estimate.high, signed)}"


def _cells(column: Measured | Unknown) -> list[str]:
    """Base, trained, difference and interval."""
    if isinstance(column, Unknown):
        return [UNMEASURED] * 4
    own = column.overall
    return [
        number(own.base.mean),
        number(own.trained.mean),
        number(own.difference.mean, True),
        _interval(own.difference, True),
    ]


def _with_intervals(own: Estimates) -> Iterable[str]:
    """Base, trained and difference, each with its interval."""
    for estimate, signed in ((own.base, False), (own.trained, False), (own.difference, True)):
        yield f"{number(estimate.mean, signed)} ({_interval(estimate, signed)})"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown.  rows: the heading first"""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def protocol_settings(protocol: Protocol, source: Source) -> Iterable[Setting]:
    """How the pictures were drawn, and who states it."""
    model, video = source.snapshot.model, source.video
    yield Setting("sampler", "ODE, deterministic", "the paper")
    yield Setting("denoising steps", str(source.steps), "")
    guided = f"embedded {model.guidance}" if model.guidance is not None else "no embedded one"
    yield Setting("guidance", f"{guided}, classifier-free {model.cfg}", "")
    size = f"{video.frames} frames, " if video.frames > 1 else ""
    size += f"{video.height} x {video.width}"
    size += f", {video.fps} frames per second" if video.frames > 1 else ""
    yield Setting("size", size, "")
    yield Setting("seeds", "0, 1, ..., the same for every prompt and on both sides", "")
    yield Setting("checkpoint, and whether its moving average", source.snapshot.label, "")
    if protocol.family not in (None, model.family):
        named = f"{model.family}, where the table's is {protocol.family}"
        yield Setting("model", f"{named}: not comparable with its numbers", "")
