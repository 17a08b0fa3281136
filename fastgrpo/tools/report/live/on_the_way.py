"""The report of a run under way: written again from time to time, so that a killed run has one."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.tools.report.report import write_report

EVERY_S = 60.0
SHARE = 0.01  # of the run's time, at the most


class ReportOnTheWay:
    """Writes run_dir/report.html at most once a minute, and in at most 1 % of the time.

    A report that cannot be written ends nothing: its reason is told once.
    tell: shows a line
    """

    def __init__(self, run_dir: Path, tell: Callable[[str], None]) -> None:
        self._run_dir, self._tell = run_dir, tell
        self._due = -math.inf
        self._told = False

    def write_if_due(self) -> bool:
        """Write the report where it is due. returns whether it was"""
        begun = time.monotonic()
        if begun < self._due:
            return False
        try:
            write_report(self._run_dir)
        except (UserError, OSError) as error:
            if not self._told:
                self._tell(f"report.html: {error}; the run goes on without it")
            self._told = True
        ended = time.monotonic()
        self._due = ended + max(EVERY_S, (ended - begun) / SHARE)
        return True
