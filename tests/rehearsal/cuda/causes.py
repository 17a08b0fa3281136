"""What the rehearsal counts, and the reports that hold the counts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BAD = ("mixed", "refused", "race", "hang", "gloo on the GPU", "foreign")
"""Kinds that no job may have: what a GPU would refuse, or would do wrongly and silently."""


@dataclass(frozen=True, order=True)
class Cause:
    """What was done, and the innermost line of the program that did it."""

    kind: str  # sync, collective, or one of BAD
    what: str
    file: str  # relative to the repository, or to site-packages where no line of ours is below
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.kind} {self.what}, {self.file}:{self.line} {self.function}"


@dataclass(frozen=True)
class Counted:
    """A cause and how often it was there."""

    cause: Cause
    count: int


def read(file: Path) -> Iterator[Counted]:
    """The counts of a report."""
    for row in json.loads(file.read_text())["counts"]:
        number = row.pop("count")
        yield Counted(Cause(**row), number)
