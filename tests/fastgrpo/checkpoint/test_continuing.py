"""A run that goes on with other settings says so, and a run may begin with another one's weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.checkpoint import provenance
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.tools.check.check import refuse
from fastgrpo.training.evaluation import Evaluation, compare
from tests.harness import runs

FIRST = ("optimizer.ema_decay=0.5", "evaluate.prompts=2", "evaluate.clips=0", "optimizer.lr=1e-3")


def scores(run: Path, step: int) -> Any:
    return json.loads((run / "evaluation" / f"step-{step}.json").read_text())["scores"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    runs.succeed(folder, [*runs.SMALLER, *FIRST])
    return folder


def test_a_run_begins_with_the_weights_of_another(first: Path, tmp_path: Path) -> None:
    """Its evaluation before training is the other one's after it: both of the moving average."""
    second = tmp_path / "second"
    more = ["run.iterations=1", f"run.start_from={first}", "objective.kl_weight=0.1"]
    runs.succeed(second, [*runs.SMALLER, *FIRST, *more, "optimizer.lr=1e-30"])
    assert scores(second, 0) == scores(first, 2) != scores(first, 0)
    assert runs.metrics(second)[0]["update/kl"] < 1e-9  # measured from the start
    start = json.loads((second / "provenance.json").read_text())["start"]
    assert start["checkpoint"] == str(first / "checkpoints" / "step-2")
    recipe = config.load(second / "recipe.toml")
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": second})})
    assert provenance.start_of(recipe) == first / "checkpoints" / "step-2"
    noted = (second / "provenance.json").read_text()
    (second / "provenance.json").write_text(noted.replace(start["manifest"], "0" * 64))
    with pytest.raises(UserError, match=r"run\.start_from=.* is not the checkpoint that the run"):
        provenance.start_of(recipe)


def test_a_run_goes_on_with_more_iterations_another_rate_and_other_sizes(first: Path) -> None:
    changed = ["run.iterations=3", "optimizer.lr=5e-4", "optimizer.schedule=cosine"]
    more = [*changed, "evaluate.prompts=3", "optimizer.decay_updates=9"]
    said = runs.succeed(first, [*runs.SMALLER, *FIRST, *more])
    lines = [json.loads(line) for line in (first / provenance.CHANGES).read_text().splitlines()]
    assert {line["after"] for line in lines} == {"step-2"}
    assert {line["key"]: (line["from"], line["to"]) for line in lines} == {
        "run.iterations": (2, 3),
        "optimizer.lr": (1e-3, 5e-4),
        "optimizer.schedule": (None, "cosine"),
        "optimizer.decay_updates": (76, 9),
        "evaluate.prompts": (2, 3),
    }
    assert "optimizer.lr: 0.001 -> 0.0005 from here on (changes.jsonl)" in said
    assert len(runs.metrics(first)) == 3
    summary = json.loads((first / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys()  # of the two prompts of both
    refused = runs.complaint(first, [*runs.SMALLER, *FIRST, *more, "evaluate.steps=9"])
    assert "holds a run of another recipe (evaluate.steps: None -> 9)" in refused


def test_only_the_clips_of_both_evaluations_are_compared() -> None:
    before = Evaluation(
        iteration=0,
        prompts=["a", "a", "b", "b"],
        seeds=[0, 1, 0, 1],
        scores={"P": [1.0, 2.0, 3.0, 4.0]},
        weights={"P": 1.0},
        clips=[],
    )
    after = replace(
        before, prompts=["a", "b", "c"], seeds=[0, 0, 0], scores={"P": [2.0, 5.0, 100.0]}
    )
    found = compare(before, after)
    assert found["difference"]["P"] == 1.5 and found["pairs"]["P"] == 2
    with pytest.raises(UserError, match="other held-out prompts"):
        compare(before, replace(after, prompts=["d", "e", "f"]))


def test_a_start_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = config.load(runs.RECIPE, [f"run.start_from={tmp_path}", f"run.dir={tmp_path}/run"])
    with pytest.raises(UserError, match=r"run\.start_from=.*not a run folder"):
        refuse(recipe)
    more = ["lora.rank=4", "objective.kl_weight=0.1", f"run.dir={tmp_path}/run"]
    recipe = config.load(runs.RECIPE, [f"run.start_from={tmp_path}", *more])
    with pytest.raises(UserError, match="with adapters the divergence would be"):
        refuse(recipe)
