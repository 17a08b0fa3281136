"""The numbers of a run: a JSON line per iteration, a live display or plain lines; wandb, SwanLab,
TensorBoard.

Iterations count from 0, as in `for iteration in range(start_iteration, total_iterations)`; people
read `iteration + 1`. Names of metrics: `reward/sum`, `reward/<part>`, `reward/invalid`,
`group_std/<part>`, `seconds/<phase>` and `seconds/total` of rank 0, `update/...`, `lr`; of several
ranks `seconds_min/<phase>`, `seconds_median/<phase>`, `seconds_max/<phase>`, `slowest/<phase>` and
`slowest/rank` (a rank); `resident_gib/<phase>`, on a GPU `allocated_gib/<phase>` and
`reserved_gib/<phase>`: the largest peak of any rank. An evaluation on the way has a line of its own
under the last iteration's number: `heldout/<part>` the mean, `heldout_change/<part>` its change
since before training with the 95 % interval from `heldout_low/<part>` to `heldout_high/<part>`,
`evaluation/alarm` the monitors that alarm, `evaluation/seconds`. wandb's summary also has
`heldout_before/<part>` and `heldout_after/<part>`. Everything is written inside the run's folder.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import open_to_append, replace_text
from fastgrpo.run.terminal import dashboard, open_console, plain_line
from fastgrpo.run.tracking.event_file import EventFile
from fastgrpo.run.tracking.service import Service
from fastgrpo.run.tracking.swanlab_run import SwanLab, start_swanlab
from fastgrpo.run.tracking.wandb_run import Wandb, WandbRun, start_wandb

Row = dict[str, float]  # one line of metrics.jsonl; NaN where it says null


class Tracker:
    """Writes and shows the metrics of a run on rank 0.

    On other ranks (main=False) every method does nothing.

    start_iteration: the first iteration that will be logged. Lines of metrics.jsonl from there on,
    and a last line cut off by a kill, are dropped, so that a resumed run has each iteration once.
    wandb: None leaves wandb alone (it is not even imported). Without a key the run is kept offline
    in run_dir/wandb.
    console: where to show progress; standard output when None. A live display on a terminal, plain
    lines otherwise. Use it as a context manager, or call close(): a live display leaves the
    terminal without a cursor until then.
    """

    def __init__(
        self,
        run_dir: Path,
        main: bool,
        total_iterations: int,
        start_iteration: int = 0,
        wandb: Wandb | None = None,
        console: Console | None = None,
    ) -> None:
        self.run_dir, self.main, self.total = run_dir, main, total_iterations
        self._rows: list[Row] = []
        self._start = start_iteration
        self._services: list[Service] = []
        self._events: EventFile | None = None
        self._live: Live | None = None
        if not main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        self._rows = keep_before(path, start_iteration)
        self._file = open_to_append(path)
        self._console = console or open_console()
        if missing := start_iteration - len({row["iteration"] for row in self._rows}):
            self.message(
                f"metrics.jsonl: the lines of {missing} of {start_iteration} iterations are gone "
                "(removed or damaged): charts and report leave them out"
            )
        if wandb is not None and (begun := start_wandb(run_dir, wandb)) is not None:
            self._services.append(WandbRun(begun, self.message))
        if self._console.is_terminal:
            screen = dashboard(self._rows, self.total, run_dir.name)
            self._live = Live(screen, console=self._console, refresh_per_second=4)
            self._live.start()

    def write_events(self) -> None:
        """From now on write every number for TensorBoard, too, into run_dir/tensorboard."""
        if self.main:
            self._events = EventFile(self.run_dir / "tensorboard", self._start, self.message)

    def send_to_swanlab(self, wanted: SwanLab) -> None:
        """From now on send every number to SwanLab, too; its files are in run_dir/swanlab."""
        if self.main and (run := start_swanlab(self.run_dir, wanted, self.message)):
            self._services.append(run)

    def log(self, iteration: int, metrics: Mapping[str, float], note: str = "") -> None:
        """Append the line {"iteration": ..., "time": unix seconds, ...} and show it with a note.

        A number that is not finite is written as null, which every JSON reader takes. An iteration
        may be logged in several lines with different names, for example when an evaluation follows
        it.
        """
        if not self.main:
            return
        row = {"iteration": iteration, "time": time.time(), **metrics}
        self._rows.append(row)
        if not os.fstat(self._file.fileno()).st_nlink:  # removed under the run
            self._write_again()
        else:
            try:
                self._file.write(_line(row))
                self._file.flush()
            except OSError as error:
                error.filename = str(self.run_dir / "metrics.jsonl")  # for the one line
                raise
        for service in self._services:
            # a step that it has is refused: iterations repeated after a resume equal those
            service.log(metrics, step=iteration)
        if self._events is not None:
            self._events.write(iteration, metrics)
        if self._live is not None:
            self._live.update(dashboard(self._rows, self.total, self.run_dir.name, note))
        else:
            self.message(plain_line(self._rows, self.total, note))

    def has(self, iteration: int, name: str) -> bool:
        """Whether a metric of an iteration is logged; on other ranks than the main one never."""
        return any(row["iteration"] == iteration and name in row for row in self._rows)

    def rewind(self, start_iteration: int) -> None:
        """Drop the lines of iterations that the run does again.

        wandb keeps its own, and takes no step a second time.
        """
        if not self.main:
            return
        if self._events is not None:
            self._events.start(start_iteration)
        self._rows = [row for row in self._rows if row["iteration"] < start_iteration]
        self._write_again()

    def _write_again(self) -> None:
        """Write the file of metrics anew."""
        self._file.close()
        path = self.run_dir / "metrics.jsonl"
        replace_text(path, "".join(map(_line, self._rows)))
        self._file = open_to_append(path)

    def message(self, text: str) -> None:
        """Print a line, above the live display where there is one."""
        if not self.main:
            return
        # soft_wrap: a line of a log file must not be broken at 80 columns
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def videos(
        self, iteration: int, name: str, clips: Tensor, captions: Sequence[str], fps: float
    ) -> None:
        """Show clips as a panel of the tracking services that are on.

        clips: uint8 [N, F, H, W, 3];  captions: N texts;  fps: frames per second
        """
        for service in self._services:
            service.videos(
                name,
                step=iteration,
                clips=clips,
                captions=captions,
                fps=fps,
                folder=self.run_dir,
            )

    def summary(self, values: Mapping[str, object]) -> None:
        """Give numbers of the whole run to the tracking services.

        The run's folder has them in summary.json.
        """
        for service in self._services:
            service.summarise(values)

    def close(self) -> None:
        """End the display, the file and the services' runs; a second call does nothing."""
        if not self.main or self._file.closed:
            return
        if self._live is not None:
            self._live.stop()
        self._file.close()
        for service in self._services:
            service.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _line(row: Row) -> str:
    """A line of metrics.jsonl; a number that is not finite is null."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl in order, null as NaN, without a last line that a kill cut off.

    UserError: any other line is not a JSON object of numbers with an iteration.
    """
    return [row for _, row in _lines(path)]


def keep_before(path: Path, start_iteration: int) -> list[Row]:
    """Rewrite a metrics.jsonl with only the whole lines of iterations < start_iteration.

    Returns the rows of these lines. The file is replaced in one step, so a kill leaves either the
    old or the new one.
    """
    if not path.exists():
        return []
    earlier = [(line, row) for line, row in _lines(path) if row["iteration"] < start_iteration]
    replace_text(path, "".join(f"{line}\n" for line, _ in earlier), on_disk=True)
    return [row for _, row in earlier]


def _lines(path: Path) -> list[tuple[str, Row]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct that.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            row = {
                name: math.nan if value is None else float(value) for name, value in entry.items()
            }
            rows.append((line, row | {"iteration": int(entry["iteration"])}))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            if number < len(lines):
                raise UserError(
                    f"{path}:{number}: not a line of metrics ({error}); remove that line"
                ) from error
    return rows
