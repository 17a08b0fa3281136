"""What a stage measured: rows, on disk as soon as they are known, and numbers for `fastgrpo plan`.

Imports no torch: the command that starts the stages needs none.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Value = float | int | str | bool | None
LONGEST = 150  # characters of a line that says what is missing


class Report:
    """The rows of one stage, in a JSON file that is replaced as a whole after each."""

    def __init__(self, file: Path, title: str) -> None:
        self.file, self.title = file, title
        self.rows: list[dict[str, Value]] = []
        self.numbers: dict[str, float] = {}
        self.ended = False
        self._write()

    def row(self, what: str, value: Value, unit: str = "", note: str = "") -> None:
        """Add a figure; None: it could not be had, and the note says why."""
        self.rows.append({"what": what, "value": value, "unit": unit, "note": note})
        self._write()
        print(f"  {shown(self.rows[-1])}", flush=True)

    def calibrate(self, **numbers: float) -> None:
        """Keep numbers that `fastgrpo plan` takes; shares are held to 1."""
        bounded = {
            name: value if name.endswith(("_gbs", "_gib", "tflops")) else min(value, 1.0)
            for name, value in numbers.items()
        }
        self.numbers |= {name: float(f"{value:.4g}") for name, value in bounded.items()}
        self._write()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Try something; where it fails the reason is a row, and the stage goes on."""
        try:
            yield
        except Exception as error:
            self.row(what, None, note=one_line(error))

    def end(self) -> None:
        """Note that the stage came to its end."""
        self.ended = True
        self._write()

    def _write(self) -> None:
        told = {
            "title": self.title,
            "ended": self.ended,
            "rows": self.rows,
            "numbers": self.numbers,
        }
        write_json(self.file, told)


def one_line(error: BaseException) -> str:
    """The reason of an error as one line."""
    kind = "missing" if isinstance(error, ImportError) else type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{kind}: {lines[0] if lines else ''}"[:LONGEST]


def write_json(file: Path, content: Any) -> None:
    """Replace a JSON file as a whole; a kill leaves the old one or the new one."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def read(file: Path) -> dict[str, Any]:
    """A stage's JSON; empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def shown(row: dict[str, Value]) -> str:
    """A row as a line of the table."""
    value = row["value"]
    if value is None:
        text = "-"
    elif isinstance(value, float) and not isinstance(value, bool):
        text = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value + 0.0:,.4g}"
    else:
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    line = f"{row['what']:<52} {text:>12} {row['unit']}"
    return f"{line:<78} {row['note']}".rstrip() if row["note"] else line.rstrip()


def table(stages: Sequence[dict[str, Any]]) -> str:
    """All stages' rows as text."""
    lines: list[str] = []
    for stage in stages:
        lines.append(f"\n{stage['title']} ({stage['seconds']:.0f} s, {stage['outcome']})")
        lines += [f"  {shown(row)}" for row in stage["rows"]]
    return "\n".join(lines).lstrip("\n") + "\n"
