"""Evaluations on the way: training is the same with and without them, a resumed run has each once,
and a run whose reward is hacked warns, stops or goes back.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastgrpo import train
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import Hacked
from fastgrpo.run.stopping import Stopped
from fastgrpo.session import Session, held_out
from fastgrpo.training.evaluation import Evaluation
from fastgrpo.training.evaluation.course import read_alarms
from tests.harness import runs

SMALLEST = (
    *runs.SMALL,
    *runs.SMALLER,
    "rollout.steps=3",
    "rollout.samples_per_prompt=2",
    "optimizer.ema_decay=0.5",
    "evaluate.seeds=2",
    "evaluate.prompts=2",
    "evaluate.steps=2",
)
FILES = ("evaluation/step-0.json", "evaluation/step-2.json", "evaluation/step-4.json")


def recipe(folder: Path, *overrides: str) -> Recipe:
    return config.load(
        runs.RECIPE, [*SMALLEST, "run.iterations=4", f"run.dir={folder}", *overrides]
    )


ON_THE_WAY = ("evaluate.every=2", "checkpoint.every=2")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations, evaluated after two and after four."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    train.train(recipe(folder, *ON_THE_WAY, "checkpoint.keep=9"))
    return folder


def heldout_rows(folder: Path) -> list[int]:
    return [row["iteration"] for row in runs.metrics(folder) if "heldout/sum" in row]


def test_evaluations_on_the_way_change_no_weight(calm: Path, tmp_path: Path) -> None:
    train.train(recipe(tmp_path / "never"))
    runs.assert_same_checkpoint(
        runs.checkpoint(calm, 4, tmp_path), runs.checkpoint(tmp_path / "never", 4, tmp_path)
    )
    assert heldout_rows(calm) == [1, 3] and heldout_rows(tmp_path / "never") == []


def test_each_evaluation_is_compared_with_the_first_and_the_best_is_kept(calm: Path) -> None:
    found = [Evaluation.read(calm / file) for file in FILES]
    assert set(found[1].scores) - set(found[1].weights) == set()
    monitors = {part for part, weight in found[1].weights.items() if not weight}
    assert monitors == {"sharpness", "colourfulness", "clipped", "grid", "distance"}
    sums = [float(one.columns()["sum"].mean()) for one in found]
    rows = [row for row in runs.metrics(calm) if "heldout/sum" in row]
    assert [row["heldout/sum"] for row in rows] == pytest.approx(sums[1:])
    assert rows[0]["heldout_change/sum"] == pytest.approx(sums[1] - sums[0])
    best = f"step-{2 * int(np.argmax(sums[1:])) + 2}"
    newest = json.loads((calm / "checkpoints" / "step-4" / "progress.json").read_text())
    assert newest["best"] == best and newest["best_reward"] == pytest.approx(max(sums[1:]))
    summary = json.loads((calm / "summary.json").read_text())
    assert summary["after"]["sum"] == pytest.approx(sums[2])


@pytest.mark.parametrize("moment", ["during", "after"])
def test_a_stopped_run_has_each_evaluation_once(
    moment: str, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped during the evaluation after two iterations, and after it, before the checkpoint."""
    made: list[int] = []
    real = held_out.evaluate_now

    def evaluate(session: Session) -> Evaluation:
        iteration = session.progress.iteration
        if moment == "during" and iteration == 2 and 2 not in made:
            made.append(2)
            raise Stopped
        made.append(iteration)
        evaluation = real(session)
        if moment == "after" and made == [0, 2]:
            raise Stopped
        return evaluation

    for module in (held_out, train):
        monkeypatch.setattr(module, "evaluate_now", evaluate)
    assert train.train(recipe(tmp_path / "run", *ON_THE_WAY)) is None
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-2\n"
    assert train.train(recipe(tmp_path / "run", *ON_THE_WAY)) is not None
    assert made == ([0, 2, 2, 4] if moment == "during" else [0, 2, 4])
    assert heldout_rows(tmp_path / "run") == [1, 3]
    for file in FILES:
        assert (tmp_path / "run" / file).read_bytes() == (calm / file).read_bytes()


@pytest.fixture
def hacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The evaluation after four iterations finds a hacked reward.  yields the iterations of all"""
    made: list[int] = []
    real = held_out.evaluate_now

    def evaluate(session: Session) -> Evaluation:
        evaluation = real(session)
        made.append(evaluation.iteration)
        shift = {"VQ": evaluation.iteration, "sharpness": -1e3 * (evaluation.iteration > 2)}
        for part, by in shift.items():
            evaluation.scores[part][:] = [value + by for value in evaluation.scores[part]]
        evaluation.write(session.recipe.run.dir / f"evaluation/step-{evaluation.iteration}.json")
        return evaluation

    for module in (held_out, train):
        monkeypatch.setattr(module, "evaluate_now", evaluate)
    yield made


HACKED = (*ON_THE_WAY, "evaluate.alarm_after=1", "evaluate.alarm_returns=1")


def test_an_alarm_goes_back_to_the_best_and_then_ends_the_run(
    hacked: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    settings = recipe(folder, *HACKED, "evaluate.alarm=return")
    with pytest.raises(Hacked, match=r"sharpness got worse in 1 evaluation, so the"):
        train.train(settings)
    told = capfd.readouterr().out
    assert "back to step-2, with 0.5 of the rate" in told and "goes on without" not in told
    assert hacked == [0, 2, 4, 4]
    lrs = [row["lr"] for row in runs.metrics(folder) if "lr" in row]
    assert [row["iteration"] for row in runs.metrics(folder) if "lr" in row] == [0, 1, 2, 3]
    factors = np.array(lrs) / settings.optimizer.lr
    decay = 1 - 0.9 * (2 * np.arange(4) + 2) / settings.optimizer.decay_updates
    assert factors == pytest.approx(decay * [1, 1, 0.5, 0.5])
    first, last = read_alarms(folder)
    assert (first.iteration, first.back_to, first.lr_factor) == (4, 2, 0.5)
    assert (last.iteration, last.back_to, last.lr_factor) == (4, None, 0.5)
    assert "sharpness" in first.monitors and "sharpness" in last.monitors
    # what it ended with is saved, and started again it goes on where a person says so
    with pytest.raises(Hacked, match="the run went back"):
        train.train(settings)
    assert train.train(recipe(folder, *HACKED, "evaluate.alarm=warn")) is not None
    assert hacked == [0, 2, 4, 4], "the last evaluation is not made again"


def test_a_run_that_only_warns_ends_as_ever(
    hacked: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.train(recipe(tmp_path / "run", *HACKED)) is not None
    told = capfd.readouterr().out
    assert "iteration 4: the held-out reward has risen and sharpness got worse" in told
    assert [one.action for one in read_alarms(tmp_path / "run")] == ["warn"]
    assert "warned" in (tmp_path / "run" / "report.html").read_text()
