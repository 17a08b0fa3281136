"""The stages in their order of value, and how one is run: as a child that ends at its limit."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import report


@dataclass(frozen=True)
class Stage:
    """One file of stages/."""

    letter: str
    name: str
    share: float  # of the time, against the other stages' shares; seconds of 12 minutes
    title: str


STAGES = (
    Stage("a", "machine", 45, "(a) machine: versions, peaks, bandwidths"),
    Stage("b", "demo", 170, "(b) demo: preflight and ten iterations of t2v_tiny"),
    Stage("c", "ratio", 75, "(c) ratio: the bias of bfloat16 in other batch shapes"),
    Stage("d", "blocks", 130, "(d) blocks of HunyuanVideo, forward and backward"),
    Stage(
        "e", "network", 140, "(e) network: 12.8 B parameters, VAE, LoRA update, against the plan"
    ),
    Stage("f", "determinism", 30, "(f) determinism: a backward twice"),
    Stage("g", "contexts", 60, "(g) contexts: a background checkpoint and the other GPUs"),
    Stage("h", "rewards", 70, "(h) rewards: VideoAlign and CLIP-H of published size"),
)


@dataclass(frozen=True)
class Setup:
    """What every stage is told."""

    out: Path  # the folder of the results
    small: bool  # sizes for a CPU

    def file(self, name: str) -> Path:
        """The JSON of the stage of this name."""
        return self.out / f"{name}.json"


def chosen(names: str | None) -> list[Stage]:
    """The stages of letters or names with commas between; None: all.  Raises ValueError."""
    if names is None:
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",")]
    by_name = {key: stage for stage in STAGES for key in (stage.letter, stage.name)}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        known = ", ".join(f"{stage.letter} or {stage.name}" for stage in STAGES)
        raise ValueError(f"{unknown[0]}: no such stage; use {known}")
    kept = {by_name[name].letter for name in wanted}
    return [stage for stage in STAGES if stage.letter in kept]


def run(stage: Stage, setup: Setup, limit_s: float) -> dict[str, Any]:
    """Run one stage for at most so many seconds.  returns its rows and how it ended"""
    file = setup.file(stage.name)
    file.unlink(missing_ok=True)
    begun = time.perf_counter()
    log = setup.out / f"{stage.name}.log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            command(stage, setup),
            cwd=ROOT,
            env=_environment(),
            stderr=errors,
            start_new_session=True,
        )
        code = _wait(child, limit_s)
    found = report.read(file)
    if code is None:
        outcome = f"cut at {limit_s:.0f} s"
    elif code == 0 and found.get("ended"):
        outcome = "ended"
    else:
        outcome = f"exit code {code}, see {log.name}"
    rows = found.get("rows", [])
    seconds = time.perf_counter() - begun
    numbers = found.get("numbers", {})
    return {
        "name": stage.name,
        "title": stage.title,
        "outcome": outcome,
        "seconds": seconds,
        "rows": rows,
        "numbers": numbers,
    }


def command(stage: Stage, setup: Setup) -> list[str]:
    """The words that start a stage's process."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage.name]
    return [*words, "--out", str(setup.out), *(["--small"] if setup.small else [])]


def _environment() -> dict[str, str]:
    """This process's environment, in which the repository can be imported, and torch be quiet."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | wanted | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _wait(child: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    """The exit code; None where the child and all that it started had to be killed."""
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also what an ended stage left behind
        child.wait()
