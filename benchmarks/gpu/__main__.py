"""What a first card shows in a quarter of an hour, the most telling measurements first.

    python -m benchmarks.gpu [--minutes 12] [--out FOLDER] [--only a,c,f] [--small]

Each stage has its own time limit and is a child process that is killed there; what a quick one
leaves goes to those that follow. After every stage FOLDER has results.json, table.txt and
calibration.json, which `fastgrpo plan --calibration` reads. Without a card, or with --small,
everything runs in sizes for a CPU.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import STAGES, Setup, Stage, chosen, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages.  returns 0, 1 where not all ended, 2 for a mistake in the command"""
    asked = _parser().parse_args(argv)
    setup = Setup(asked.out.resolve(), asked.small)
    setup.out.mkdir(parents=True, exist_ok=True)
    if asked.stage:
        return _child(next(stage for stage in STAGES if stage.name == asked.stage), setup)
    try:
        stages, limits = chosen(asked.only), _limits(asked.limit)
    except ValueError as error:
        print(f"benchmarks.gpu: {error}.", file=sys.stderr)
        return 2
    done = run_all(stages, setup, 60 * asked.minutes, limits)
    print(f"\n{setup.out}: results.json, table.txt, calibration.json")
    return 0 if all(stage["outcome"] == "ended" for stage in done) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=12.0, help="of all stages together (default: 12)")
    add("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="default: runs/gpu")
    add("--only", metavar="a,b", help="letters or names of stages (default: all)")
    add("--small", action="store_true", help="sizes for a CPU, also on a card")
    add("--limit", action="append", default=[], metavar="a=SECONDS", help="of one stage")
    add("--stage", choices=[stage.name for stage in STAGES], help=argparse.SUPPRESS)
    return parser


def _limits(settings: Sequence[str]) -> dict[str, float]:
    """Seconds by letter.  Raises ValueError."""
    limits = {}
    for setting in settings:
        name, _, seconds = setting.partition("=")
        (stage,) = chosen(name)
        limits[stage.letter] = float(seconds)
    return limits


def run_all(
    stages: Sequence[Stage], setup: Setup, seconds: float, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """Run the stages within so many seconds, and write what is known after each.

    limits: seconds of single stages by letter, in place of their shares
    """
    ends, done = time.monotonic() + seconds, list[dict[str, Any]]()
    for number, stage in enumerate(stages):
        share = stage.share / sum(later.share for later in stages[number:])
        limit = limits.get(stage.letter, max(0.0, ends - time.monotonic()) * share)
        print(f"{stage.title}: at most {limit:.0f} s", flush=True)
        done.append(run(stage, setup, limit))
        print(f"  {done[-1]['outcome']} after {done[-1]['seconds']:.0f} s", flush=True)
        _write(setup, done)
    return done


def _write(setup: Setup, done: Sequence[dict[str, Any]]) -> None:
    """The results of the stages that were run, as JSON, as a table and as numbers for the plan."""
    report.write_json(setup.out / "results.json", {"date": str(date.today()), "stages": done})
    (setup.out / "table.txt").write_text(report.table(done), encoding="utf-8")
    numbers: dict[str, float] = {}
    for stage in done:
        numbers |= stage["numbers"]
    machine = {
        row["what"]: row["value"]
        for stage in done
        if stage["name"] == "machine"
        for row in stage["rows"]
    }
    told = {
        "machine": machine.get("device", "unknown"),
        "date": str(date.today()),
        "torch": machine.get("torch", "unknown"),
        "numbers": numbers,
    }
    report.write_json(setup.out / "calibration.json", told)


def _child(stage: Stage, setup: Setup) -> int:
    """Run one stage in this process."""
    told = Report(setup.file(stage.name), stage.title)
    with told.attempt(f"stage {stage.letter}"):
        importlib.import_module(f"benchmarks.gpu.stages.{stage.name}").run(setup, told)
    told.end()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
