"""Stage (g): which processes hold memory on which GPU while checkpoints are written.

Every rank should be on its own GPU alone. A thread that asks for "the" current stream opens GPU 0
in every process, about half a GiB each; nvidia-smi shows it, and nothing else does.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu.report import Report
from benchmarks.gpu.schedule import Setup
from benchmarks.gpu.stages.demo import COMMON, FEW, RECIPE

ASKED = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader"]
EVERY_S, MOST_RANKS = 0.3, 8
Seen = dict[str, dict[str, float]]  # GPU -> process -> MiB, the most that was seen


def run(setup: Setup, report: Report) -> None:
    """Train the tiny model on every GPU, with background checkpoints and without."""
    import torch

    on_gpu = torch.cuda.is_available()
    ranks = min(torch.cuda.device_count(), MOST_RANKS) if on_gpu else 2
    report.row(
        "ranks", ranks, note="on other GPUs nothing can be seen with one" if ranks == 1 else ""
    )
    for background in (True, False):
        name = "checkpoint in the background" if background else "checkpoint at once"
        with report.attempt(name), tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as folder:
            seen, saved, problem = _train(ranks, background, Path(folder))
            report.row(f"{name}: saved", saved, "checkpoints", problem)
            for number, (gpu, processes) in enumerate(sorted(seen.items())):
                held = ", ".join(f"{pid} {mib:,.0f} MiB" for pid, mib in sorted(processes.items()))
                report.row(f"{name}: GPU {number}", len(processes), "processes", f"{gpu}: {held}")
    with report.attempt("nvidia-smi"):
        subprocess.run(ASKED, capture_output=True, check=True, timeout=15)


def _train(ranks: int, background: bool, folder: Path) -> tuple[Seen, int, str]:
    """Run a few iterations.  returns what nvidia-smi saw, the checkpoints, and what went wrong"""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    words += ["fastgrpo.cli", "train", str(RECIPE), *COMMON, *FEW, f"run.dir={folder}/run"]
    words += ["run.iterations=3", "run.preflight=false", "checkpoint.every=1", "checkpoint.keep=3"]
    words += [f"checkpoint.background={str(background).lower()}", "prompts.per_iteration=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    seen: Seen = defaultdict(dict)
    log = folder / "log"
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        while child.poll() is None:
            _look(seen)
            time.sleep(EVERY_S)
    saved = len(list((folder / "run" / "checkpoints").glob("step-*")))
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    problem = f"exit code {child.returncode}: {lines[-1] if lines else ''}"
    return seen, saved, problem if child.returncode else ""


def _look(seen: Seen) -> None:
    """Note who holds memory now; nothing where there is no nvidia-smi."""
    try:
        told = subprocess.run(ASKED, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in told.splitlines():
        gpu, process, memory = (part.strip() for part in line.split(","))
        mib = float(memory.split()[0]) if memory.split()[0].isdigit() else 0.0
        seen[gpu][process] = max(mib, seen[gpu].get(process, 0.0))
