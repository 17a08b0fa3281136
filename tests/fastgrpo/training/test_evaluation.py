"""The paired comparison of two evaluations: what counts, and where there is no interval."""

import json
import math
from typing import Any

import numpy as np
import pytest

from fastgrpo.cli.train import print_summary
from fastgrpo.core.files import nan_to_null, null_to_nan
from fastgrpo.training.evaluation import Evaluation, compare
from tests import ROOT

SEEDS = 2


def evaluation(scores: list[float], iteration: int = 0) -> Evaluation:
    """Two clips per prompt."""
    prompts = [f"prompt {n // SEEDS}" for n in range(len(scores))]
    return Evaluation(
        iteration=iteration,
        prompts=prompts,
        seeds=[n % SEEDS for n in range(len(scores))],
        scores={"A": scores},
        weights={"A": 1.0},
        clips=[],
    )


def compared(before: list[float], after: list[float]) -> dict[str, Any]:
    return {name: own["A"] for name, own in compare(evaluation(before), evaluation(after)).items()}


def test_the_interval_of_one_prompt_is_none() -> None:
    result = compared([0.0, 1.0], [1.0, 1.5])
    assert result["difference"] == 0.75 and result["pairs"] == 2
    assert all(map(math.isnan, result["ci95"]))


def test_prompts_without_a_pair_do_not_draw_the_interval_to_zero() -> None:
    """The oracle: the same comparison without these prompts."""
    rng = np.random.default_rng(1)
    before, gain = rng.normal(size=8), 5 + rng.normal(size=8)
    nothing = [math.nan] * 12
    whole = compared(before.tolist(), (before + gain).tolist())
    some = compared([*before, *range(12)], [*(before + gain), *nothing])
    assert some == whole and some["ci95"][0] > 3 and some["pairs"] == 8


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(2)
    gain = rng.normal(size=400)
    low, high = compared([0.0] * 400, gain.tolist())["ci95"]
    of_prompts = gain.reshape(-1, SEEDS).mean(1)
    expected = of_prompts.mean() + np.array([-1.96, 1.96]) * of_prompts.std() / np.sqrt(200)
    assert [low, high] == pytest.approx(expected, abs=0.01)


def test_without_any_pair_nothing_is_known() -> None:
    result = compared([math.nan] * 4, [1.0] * 4)
    assert result["pairs"] == 0
    assert all(math.isnan(result[name]) for name in ("before", "after", "difference"))


def test_what_is_not_known_is_a_dash_on_the_terminal_and_null_in_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary: dict[str, Any] = dict(compare(evaluation([0.0, 1.0]), evaluation([1.0, 1.5])))
    text = json.dumps(nan_to_null(summary), allow_nan=False)
    assert json.loads(text)["ci95"]["A"] == [None, None]
    assert math.isnan(null_to_nan(json.loads(text))["ci95"]["A"][0])
    print_summary(summary | {"iterations": 1, "wall_seconds": 1.0}, ROOT)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if " A " in line)
    assert row.split("│")[-2].strip() == "-" and "nan" not in out
