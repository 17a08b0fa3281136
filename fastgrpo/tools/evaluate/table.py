"""A comparison in the form of the paper's tables.

Rewards are columns; base, trained and the difference are rows.
"""

import math
from collections.abc import Sequence

from rich.table import Table

from fastgrpo.tools.evaluate.evaluate import Column, Result
from fastgrpo.tools.score import score

DIFFERENCE = "difference"
INTERVAL = "95 % interval"


def rows(result: Result) -> list[list[str]]:
    """The table as text, the heading first; a dash where no pair of clips has a score."""
    base, trained = result.labels
    cells = [_cells(column) for column in result.columns.values()]
    names = ["", base, trained, DIFFERENCE, INTERVAL]
    heading = [result.heading(key) for key in result.columns]
    return [[names[0], *heading], *([names[n + 1], *(cell[n] for cell in cells)] for n in range(4))]


def _cells(column: Column) -> Sequence[str]:
    """Base, trained, difference and interval with equal decimals, so that they compare."""
    if not column.pairs:
        return ["-"] * 4
    largest = max(abs(column.base), abs(column.trained))
    digits = 4 if largest < 1 else 3 if largest < 100 else 1
    interval = "-"
    if math.isfinite(column.low):
        interval = f"{column.low:+.{digits}f} .. {column.high:+.{digits}f}"
    means = [f"{mean:.{digits}f}" for mean in (column.base, column.trained)]
    return [*means, f"{column.difference:+.{digits}f}", interval]


def markdown(result: Result) -> str:
    """A table for a README or a paper's draft, with its caption below."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows(result)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    rule = "|---" + "|---:" * len(result.columns) + "|"
    return "\n".join([lines[0], rule, *lines[1:], "", f"{result.caption()}.", ""])


def show(result: Result) -> None:
    """Print the table, with rewards as rows where the terminal is too narrow for columns."""
    console, cells = score.console(), rows(result)
    if sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True)) + 1 > console.width:
        cells = [list(column) for column in zip(*cells, strict=True)]
    heading, *body = cells
    table = Table()
    for name in heading:
        table.add_column(name, justify="right" if name else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)
    console.print(result.caption() + ".", soft_wrap=True)
