"""Real runs of a small recipe in processes of their own, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastgrpo.core.files import sha256
from tests import ROOT
from tests.harness import forks

Run = Callable[[Path, Sequence[str], int], forks.Completed]
RECIPE = ROOT / "launch" / "t2v_tiny.toml"
SMALL = (
    "run.iterations=3",
    # which test_preflight covers, and which would take its second in every run here
    "run.preflight=false",
    "prompts.limit=20",
    "prompts.per_iteration=2",
    "rollout.samples_per_prompt=4",
    "rollout.steps=4",
    "rollout.batch_size=4",
    "objective.best_of_n=none",
    "optimizer.batch_size=8",
    "optimizer.updates_per_iteration=2",
    "optimizer.ema_decay=0.5",
    "checkpoint.every=1",
    "evaluate.prompts=2",
    "evaluate.seeds=1",
    "evaluate.clips=2",
)
SMALLER = (
    "run.iterations=2",
    "evaluate.prompts=1",
    "evaluate.clips=0",
    "optimizer.lr=1e-3",
    "rewards.0.where=process",
)
LIMIT = 180  # seconds for one run


def arguments(folder: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Of `fastgrpo`, for a small run into `folder`."""
    return ["train", str(RECIPE), *SMALL, f"run.dir={folder}", *overrides]


def command(folder: Path, overrides: Sequence[str] = (), ranks: int = 1) -> list[str]:
    """argv of a small run into `folder`, as a person starts it."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*start, "fastgrpo.cli", *arguments(folder, overrides)]


def started(folder: Path, overrides: Sequence[str] = (), ranks: int = 1) -> forks.Completed:
    """Run to the end, whatever that is, as a person starts it: by Python, or by torchrun where
    there are ranks.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(folder, overrides, ranks),
        cwd=ROOT,
        env=environment,
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )


def forked(folder: Path, overrides: Sequence[str] = (), ranks: int = 1) -> forks.Completed:
    """The same from a process that has imported everything, which saves seconds."""
    return forks.run("fastgrpo.cli", arguments(folder, overrides), ranks if ranks > 1 else 0, LIMIT)


def succeed(folder: Path, overrides: Sequence[str] = (), ranks: int = 1, run: Run = forked) -> str:
    """Run to a good end.  returns stdout"""
    result = run(folder, overrides, ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def complaint(folder: Path, overrides: Sequence[str] = (), run: Run = forked) -> str:
    """Run into a user's mistake.  returns its one line"""
    result = run(folder, overrides, 1)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("fastgrpo: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def write_manifest(checkpoint: Path) -> None:
    """Have a checkpoint's manifest vouch for the files that are there now."""
    if not (checkpoint / "progress.json").exists():
        (checkpoint / "progress.json").write_text("{}")
    files = [file for file in checkpoint.iterdir() if file.name != "manifest.json"]
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, step: int, scratch: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, unsharded, by its name."""
    file = scratch / f"{folder.name}-{step}.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step}", file)
    flat: dict[str, Tensor] = {}

    def walk(prefix: str, node: object) -> None:
        if isinstance(node, Tensor):
            flat[prefix] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}", value)

    walk("", torch.load(file, weights_only=False))
    assert any(".ema." in name for name in flat) and any(".optimizer." in name for name in flat)
    return flat


def assert_same_checkpoint(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
