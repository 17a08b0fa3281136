"""What a job did against its golden list, and its numbers against the CPU path's."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from tests.rehearsal.cuda import causes
from tests.rehearsal.cuda.causes import BAD, Cause
from tests.rehearsal.drive import Outcome
from tests.rehearsal.jobs import UNPLANTED, Job

GOLDEN = Path(__file__).parent / "golden"
HEAD = "# count, kind, what, file and function, of the busiest process: python -m tests.rehearsal"
NUMBERS = ("reward/sum", "update/grad_norm")
"""Metrics of the first iteration that the CPU path has to have, too."""

Counts = dict[Cause, int]


@dataclass(frozen=True)
class Found:
    """What is wrong with a job, and what is known to be wrong."""

    wrong: list[str]
    known: list[str]
    waits: int  # host waits of the busiest process


def reported(folder: Path) -> Counts:
    """By cause, the count of the process that has the most of it."""
    counts: Counts = {}
    for file in folder.glob("report-*.json"):
        for row in causes.read(file):
            counts[row.cause] = max(counts.get(row.cause, 0), row.count)
    return counts


def by_function(counts: Counts) -> Counts:
    """The same without line numbers."""
    merged: Counts = {}
    for cause, count in counts.items():
        key = replace(cause, line=0)
        merged[key] = merged.get(key, 0) + count
    return merged


def golden_file(name: str) -> Path:
    """The list of a job."""
    return GOLDEN / f"{name}.txt"


def write_golden(name: str, counts: Counts) -> None:
    """Make what a job did its list."""
    GOLDEN.mkdir(exist_ok=True)
    kept = {cause: n for cause, n in by_function(counts).items() if cause.kind not in BAD}
    rows = [
        f"{count:5}  {cause.kind}  {cause.what}  {cause.file}  {cause.function}"
        for cause, count in sorted(kept.items(), key=lambda row: _order(row[0]))
    ]
    golden_file(name).write_text("\n".join([HEAD, *rows]) + "\n")


def _order(cause: Cause) -> tuple[str, ...]:
    return cause.file, cause.function, cause.kind, cause.what


def read_golden(name: str) -> Counts | None:
    """The list of a job; None: it has none."""
    if not golden_file(name).exists():
        return None
    counts: Counts = {}
    for line in golden_file(name).read_text().splitlines()[1:]:
        count, kind, what, file, function = line.strip().split("  ")
        counts[Cause(kind, what, file, function, 0)] = int(count)
    return counts


def differences(actual: Counts, golden: Counts) -> list[str]:
    """Causes that the list has not, has less often, or has and the job has not."""
    merged = {cause: n for cause, n in by_function(actual).items() if cause.kind not in BAD}
    lines: dict[Cause, list[int]] = {}
    for cause in sorted(actual):
        lines.setdefault(replace(cause, line=0), []).append(cause.line)
    found = []
    for cause, count in sorted(merged.items(), key=lambda row: _order(row[0])):
        told = replace(cause, line=lines[cause][0])
        if cause not in golden:
            found.append(f"new: {told}, {count} times")
        elif count > golden[cause]:
            found.append(f"more: {told}, {count} times and not {golden[cause]}")
    gone = [cause for cause in golden if cause not in merged]
    return [*found, *(f"gone: {cause}" for cause in sorted(gone, key=_order))]


def first_metrics(folder: Path) -> dict[str, float]:
    """NUMBERS of a run's first iteration; empty where there is none."""
    file = folder / "run" / "metrics.jsonl"
    if not file.exists():
        return {}
    lines = file.read_text().splitlines()
    row = json.loads(lines[0]) if lines else {}
    return {name: row[name] for name in NUMBERS if name in row}


def unlike(folder: Path, job: Job) -> list[str]:
    """Numbers of a run that are not those of the job that it is like, to rounding."""
    if job.like is None:
        return []
    actual, expected = first_metrics(folder), first_metrics(folder.parent / job.like)
    found = [] if expected else [f"{job.like} has no numbers"]
    for name, number in expected.items():
        value = actual.get(name, math.nan)
        if not math.isclose(value, number, rel_tol=job.tolerance):
            found.append(f"{name}={value:.6g}, and {job.like} has {number:.6g}")
    return found


def clipped(folder: Path) -> list[str]:
    """What an update that changes nothing may not have: a ratio that is not 1."""
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    found = [
        f"{name}={row[name]:.3g} of a policy that has not moved"
        for name in ("update/clip_fraction", "update/max_log_ratio")
        if row[name] != 0.0
    ]
    if not (row["update/max_log_ratio_first"] > 0.0 < row["update/evaluated_again"]):
        found.append("no product was rounded otherwise")
    return found


def judge(outcome: Outcome, golden: Counts | None) -> Found:
    """All that is wrong with a job.

    golden: its list. None: it has none
    """
    job = outcome.job
    counts = {} if job.cpu else reported(outcome.folder)
    found = [f"exit code {outcome.code}: {outcome.last_line}"] if outcome.code else []
    found += [f"{cause}, {n} times" for cause, n in sorted(counts.items()) if cause.kind in BAD]
    if not outcome.code:
        found += unlike(outcome.folder, job)
        if job.rounds:
            found += clipped(outcome.folder)
        elif golden is not None:
            found += differences(counts, golden)
        elif not (job.cpu or job.name == UNPLANTED):
            found.append("no golden list: --update makes one")
    known = [line for line in found if any(fault in line for fault in job.faults)]
    gone = [fault for fault in job.faults if not any(fault in line for line in found)]
    wrong = [line for line in found if line not in known]
    wrong += [f"no longer there, take it out of jobs.py: {fault}" for fault in gone]
    return Found(wrong, known, sum(n for cause, n in counts.items() if cause.kind == "sync"))
