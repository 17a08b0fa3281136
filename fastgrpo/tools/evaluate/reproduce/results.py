"""An entry's table or curves from its finished runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrpo.core.files import replace_text
from fastgrpo.run.tracker import read_metrics
from fastgrpo.tools.evaluate.benchmark.catalogue import COLUMNS
from fastgrpo.tools.evaluate.benchmark.protocols import NOT_STATED, PROTOCOLS
from fastgrpo.tools.evaluate.benchmark.sheet import (
    PAPER,
    STAND_IN,
    UNMEASURED,
    markdown_table,
    number,
)
from fastgrpo.tools.evaluate.reproduce.entries import Entry, Run
from fastgrpo.tools.evaluate.reproduce.recipes import Options, file_of, folder_of

Sheet = Mapping[str, Any]
WINDOW = 10
"""Iterations of a curve's moving average; the paper states none."""


@dataclass(frozen=True)
class Outcome:
    """What became of an entry's runs."""

    sheets: Mapping[str, Sheet]
    """By run, as `evaluate --benchmark` writes them; the first is of the paper's own method."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why a baseline has none."""

    @property
    def first(self) -> Sheet:
        """The sheet whose base and settings stand for all."""
        return next(iter(self.sheets.values()))


def write_table(name: str, entry: Entry, options: Options, outcome: Outcome) -> list[Path]:
    """OUT/NAME.md and NAME.json.  returns both"""
    rows, told = table_rows(entry, outcome), notes(entry, options, outcome)
    text = [f"**{entry.title}**", "", *markdown_table(rows), "", *(f"- {line}" for line in told)]
    files = [options.out / f"{name}.md", options.out / f"{name}.json"]
    replace_text(files[0], "\n".join([*text, ""]))
    content = {"entry": name, "title": entry.title, "stand_in": options.stands_in}
    content |= {"runs": [_about(run, options) for run in entry.runs]}
    content |= {"table": rows, "notes": told, "sheets": dict(outcome.sheets)}
    replace_text(files[1], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return files


def table_rows(entry: Entry, outcome: Outcome) -> list[list[str]]:
    """The paper's table: the base model, a row per run or method, and the paper's own rows."""
    sheets = outcome.sheets
    assert entry.benchmark is not None
    protocol = PROTOCOLS[entry.benchmark]
    columns = protocol.columns
    heading = ["", *(_heading(column, [*sheets.values()]) for column in columns)]
    rows = {"base": {column: _cell(outcome.first, column, "base") for column in columns}}
    for run in entry.runs:
        row = rows.setdefault(run.row, {})
        for column in columns:
            if column in run.trained or not entry.own_column:
                row[column] = _cell(sheets.get(run.name), column, "trained")
    found = [[label, *(row.get(column, "") for column in columns)] for label, row in rows.items()]
    for label, numbers in protocol.paper.items():
        cells = [f"{numbers[column]}" if column in numbers else "" for column in columns]
        found.append([PAPER + label, *cells])
    return [heading, *found]


def _heading(column: str, sheets: Sequence[Sheet]) -> str:
    stands_in = any(sheet["columns"][column].get("stand_in") for sheet in sheets)
    return f"{column} ({STAND_IN})" if stands_in else column


def _cell(sheet: Sheet | None, column: str, side: str) -> str:
    """A mean with its interval over prompts, or the mark of what is not known."""
    overall = None if sheet is None else sheet["columns"][column]["overall"]
    if overall is None or overall[side]["mean"] is None:
        return UNMEASURED
    mean, low, high = (overall[side][key] for key in ("mean", "low", "high"))
    interval = "" if low is None else f" ({number(low)} .. {number(high)})"
    return f"{number(mean)}{interval}"


def notes(entry: Entry, options: Options, outcome: Outcome) -> list[str]:
    """How the runs and numbers were made, and what is open."""
    lines = [f"not stated by the paper: {line}" for line in entry.open]
    if options.stands_in:
        lines.insert(0, "a stand-in by --recipe or --judge: these are not the paper's numbers")
    for run in entry.runs:
        about = _about(run, options)
        marked = f"baseline {run.baseline}, " if run.baseline else ""
        switches = " ".join([*run.switches, *options.settings])
        told = outcome.left_out.get(run.name)
        if told is None:
            told = str(outcome.sheets[run.name]["weights"]["trained"])
        lines.append(
            f"{run.row} ({run.name}): {marked}{about['recipe']}"
            f"{' with ' + switches if switches else ''}; {told}"
        )
    for name, column in outcome.first["columns"].items():
        told = f"{UNMEASURED}: {column['unknown']}" if "unknown" in column else column["judge"]
        lines.append(f"{name}: {told}")
    for one in outcome.first["settings"]:
        lines.append(f"{one['name']}: {one['value']} ({one['said_by'] or NOT_STATED})")
    return lines


def _about(run: Run, options: Options) -> dict[str, Any]:
    """A run, as JSON."""
    return {
        "name": run.name,
        "row": run.row,
        "baseline": run.baseline,
        "recipe": str(file_of(run, options)),
        "switches": [*run.switches, *options.settings],
        "trained": dict(run.trained),
        "thresholds": dict(run.thresholds),
        "folder": str(folder_of(run, options)),
    }


def write_curves(
    name: str, entry: Entry, options: Options, left_out: Mapping[str, str]
) -> list[Path]:
    """OUT/NAME.png and NAME.json: the columns' training rewards over iterations.

    left_out: why, by name, of runs without any
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for run in entry.runs:
        if run.name in left_out:
            continue
        rows = read_metrics(folder_of(run, options) / "metrics.jsonl")
        for column in entry.curves:
            key = f"reward/{_part(column, options)}"
            values = [row.get(key, math.nan) for row in rows]
            if column in run.trained or any(math.isfinite(value) for value in values):
                found.setdefault(column, {})[run.row] = [_or_null(value) for value in values]
    files = [options.out / f"{name}.png", options.out / f"{name}.json"]
    content = {"entry": name, "title": entry.title, "stand_in": options.stands_in}
    content |= {"window": WINDOW, "runs": [_about(run, options) for run in entry.runs]}
    content |= {"rewards": found, "not stated by the paper": list(entry.open)}
    content |= {"left out": dict(left_out)}
    replace_text(files[1], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _draw(entry.title, found, files[0])
    return files


def _part(column: str, options: Options) -> str:
    """The part by which metrics.jsonl calls a column."""
    return options.judges[column][1] if column in options.judges else COLUMNS[column].part


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def smoothed(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Means over the last WINDOW iterations, fewer at the beginning; missing values are left out."""
    found = np.full(len(values), math.nan)
    for end in range(len(values)):
        own = [one for one in values[max(0, end + 1 - WINDOW) : end + 1] if one is not None]
        if own:
            found[end] = sum(own) / len(own)
    return found


def _draw(
    title: str, found: Mapping[str, Mapping[str, Sequence[float | None]]], file: Path
) -> None:
    """A panel per column, a moving average per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * max(1, len(found)), 3.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for axis, (column, curves) in zip(axes, found.items(), strict=False):
        for label, values in curves.items():
            axis.plot(np.arange(1, len(values) + 1), smoothed(values), label=label)
        axis.set(xlabel="iteration", ylabel=f"{column}, mean of {WINDOW} iterations")
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})
