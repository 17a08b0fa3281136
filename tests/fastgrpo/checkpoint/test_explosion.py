"""Weights that explode: named as that, the last good checkpoint kept, and no restart in vain."""

import json
from pathlib import Path

import pytest
import torch

from fastgrpo.tools.report.report import write_report
from fastgrpo.training.trainer import Trainer
from tests.harness import forks, runs

pytestmark = pytest.mark.slow  # whole runs

LAST = 4  # the optimizer step that explodes: the last of the second iteration
step = Trainer.step


def exploding(factor: float) -> None:
    """Let an optimizer step multiply the weights."""

    def exploded(self: Trainer) -> torch.Tensor:
        norm = step(self)
        if self.updates == LAST:
            with torch.no_grad():
                for parameter in self.policy.network.parameters():
                    parameter.mul_(factor)
        return norm

    Trainer.step = exploded  # type: ignore[method-assign]


def by_1e30(rank: int) -> None:
    exploding(1e30)


def to_nan(rank: int) -> None:
    exploding(float("nan"))


def run(folder: Path, first: object, *overrides: str) -> tuple[int, str, str]:
    """returns the exit code, standard output and the one line of the error"""
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    command = runs.arguments(folder, [*runs.SMALLER, "run.iterations=4", *overrides])
    started = forks.start("fastgrpo.cli", command, output=out, errors=err, first=first)  # type: ignore[arg-type]
    code = started.wait(runs.LIMIT)
    return code, out.read_text(), err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ema", ["0", "0.5"])
def test_the_checkpoint_of_before_is_kept_and_named(ema: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["checkpoint.keep=1", f"optimizer.ema_decay={ema}"]
    code, _, told = run(folder, by_1e30, *settings)
    assert code == 2 and "the latents of 100% of the samples of iteration 3 are not finite" in told
    assert "step-2 has these weights and is set aside as step-2.exploded" in told
    assert told.rstrip().endswith("it goes on from the newest good checkpoint, step-1.")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-1", "step-2.exploded", "latest"} <= names and "step-2" not in names
    assert (folder / "checkpoints" / "latest").read_text() == "step-1\n"

    code, _, again = run(folder, None, *settings)
    assert code == 2 and "exploded in iteration 3, and would again; lower it" in again
    code, said, _ = run(folder, None, *settings, "optimizer.lr=1e-4")
    assert code == 0 and "resumed from checkpoint step-1" in said
    assert len(runs.metrics(folder)) == 4 and "lr = 0.0001" in (folder / "recipe.toml").read_text()
    refused = run(folder, None, *settings, "optimizer.lr=1e-4", "run.seed=9")[2]
    assert "holds a run of another recipe (run.seed: 0 -> 9)" in refused, "nothing else may change"


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, said, told = run(folder, to_nan)
    assert "checkpoint step-2: the weights are not finite, so that it is not written" in said
    assert code == 2 and told.rstrip().endswith("the newest good checkpoint, step-1.")
    assert not (folder / "checkpoints" / "step-2.exploded").exists()


@pytest.mark.slow
def test_a_rate_that_blows_up_is_told_while_it_happens(tmp_path: Path) -> None:
    code, said, _ = run(tmp_path / "run", None, "optimizer.lr=1.0", "checkpoint.keep=1")
    assert code == 0
    assert "iteration 1: an optimizer step moved the policy beyond all bounds" in said
    assert "iteration 2: the reward fell from 1.734 to 0.058 at once" in said
    assert "iteration 2: nothing to learn from: the rewards of each prompt's 4 samples are" in said
    progress = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-4" / "progress.json").read_text()
    )
    assert progress["best"] is None
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["counts"]
    assert counts["iterations_without_spread"] == 3 and counts["groups_without_spread"] == 6
    assert "In 3 of 4 iterations the rewards of no prompt" in said.replace("\n", " ")
    page = write_report(tmp_path / "run").read_text()
    assert "In 3 of 4 iterations the rewards of no prompt" in page
