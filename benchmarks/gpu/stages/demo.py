"""Stage (b): preflight and ten iterations of launch/t2v_tiny.toml; its rewards beside the CPU's.

Every run is a process of its own. Noise is drawn on the CPU (iterations.py), so that the first
rollout is of the same clips; afterwards weights differ, since the first update rounds otherwise.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import measure
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup

RECIPE = ROOT / "launch" / "t2v_tiny.toml"
FEW = (
    "prompts.per_iteration=2",
    "rollout.samples_per_prompt=4",
    "objective.best_of_n=none",
    "prompts.limit=20",
)
COMMON = ("rewards.0.where=process", "evaluate.prompts=1", "evaluate.seeds=1", "evaluate.clips=0")
ITERATIONS, FEW_ITERATIONS = 10, 2
PARTS = ("reward/VQ", "reward/MQ", "reward/TA")
RATIO = "update/max_log_ratio_first"


def batches(rollout: int, update: int) -> list[str]:
    """Overrides for these batch sizes, of few samples: small batches take long."""
    return [*FEW, f"rollout.batch_size={rollout}", f"optimizer.batch_size={update}"]


@dataclass(frozen=True)
class Run:
    """A recipe's overrides, and what the rows call them."""

    name: str
    overrides: Sequence[str]


RUNS = (
    Run("float32, batches 40/80", ()),
    Run("bfloat16, batches 1/1", ["model.dtype=bfloat16", *batches(1, 1)]),
    Run("bfloat16, batches 2/1", ["model.dtype=bfloat16", *batches(2, 1)]),
)
SMALL_RUNS = (Run("float32, batches 4/8", batches(4, 8)), RUNS[2])


def run(setup: Setup, report: Report) -> None:
    """Run preflights and iterations; what a GPU alone can tell comes before what the CPU does."""
    runs = SMALL_RUNS if measure.is_small(setup) else RUNS
    count = FEW_ITERATIONS if measure.is_small(setup) else ITERATIONS
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as name:
        folder = Path(name)
        _preflight(report, runs[0], folder)
        for one in runs:
            with report.attempt(f"iterations, {one.name}"):
                metrics = _metrics(one, count, folder / "here", on_cpu=False)
                found[one.name] = metrics[0]
                _tell(report, one.name, metrics)
        for one in (runs[0], runs[-1])[: 1 if measure.device().type == "cpu" else 2]:
            if one.name in found:
                with report.attempt(f"the CPU's rewards, {one.name}"):
                    (host,) = _metrics(one, 1, folder / "host", on_cpu=True)
                    _compare(report, one.name, found[one.name], host)
        if not measure.is_small(setup):
            _preflight(report, runs[-1], folder)


def _preflight(report: Report, run: Run, folder: Path) -> None:
    """A row per check of `fastgrpo preflight`."""
    with report.attempt(f"preflight, {run.name}"):
        words = ["fastgrpo.cli", "preflight", str(RECIPE), *COMMON, *run.overrides]
        told = _python([*words, f"run.dir={folder}/preflight"], on_cpu=False)
        lines = [line for line in told.stdout.splitlines() if line.startswith(("green", "red"))]
        for line in lines:
            colour, _, rest = line.partition(" ")
            check, _, measured = rest.strip().partition(": ")
            report.row(f"preflight, {run.name}: {check}", colour, note=measured)
        if not lines:
            raise RuntimeError(_last(told))


def _tell(report: Report, name: str, metrics: Sequence[dict[str, Any]]) -> None:
    """Seconds, ratio and last rewards of the iterations."""
    seconds = statistics.median(row["seconds/total"] for row in metrics)
    report.row(f"{name}: an iteration", seconds, "s", f"median of {len(metrics)}")
    ratio = max(row[RATIO] for row in metrics)
    clipped = max(row["update/clip_fraction"] for row in metrics)
    report.row(f"{name}: max |log ratio| before a step", ratio, note=f"clipped: {clipped:.0%}")
    last = ", ".join(f"{key} {metrics[-1][key]:.3f}" for key in PARTS)
    report.row(f"{name}: rewards at the end", "", note=last)


def _compare(report: Report, name: str, here: dict[str, Any], host: dict[str, Any]) -> None:
    """The mean rewards of the first rollout, here and on the CPU."""
    for key in PARTS:
        note = f"here {here[key]:.5f}, CPU {host[key]:.5f}"
        report.row(f"{name}: first {key} less the CPU's", here[key] - host[key], note=note)


def _metrics(run: Run, count: int, folder: Path, on_cpu: bool) -> list[dict[str, Any]]:
    """The metrics of so many iterations."""
    words = ["benchmarks.gpu.iterations", str(RECIPE), str(count), *COMMON, *run.overrides]
    told = _python([*words, f"run.dir={folder / run.name.replace('/', '-')}"], on_cpu)
    if told.returncode:
        raise RuntimeError(_last(told))
    found: list[dict[str, Any]] = json.loads(told.stdout.strip().splitlines()[-1])
    return [row for row in found if RATIO in row]


def _python(words: Sequence[str], on_cpu: bool) -> "subprocess.CompletedProcess[str]":
    """A module in a process of its own, on the first GPU alone or on the CPU."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "" if on_cpu else first}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def _last(told: "subprocess.CompletedProcess[str]") -> str:
    """The last line that a process printed: of a traceback the error."""
    lines = [line for line in (told.stdout + told.stderr).splitlines() if line.strip()]
    return f"exit code {told.returncode}: {lines[-1] if lines else ''}"
