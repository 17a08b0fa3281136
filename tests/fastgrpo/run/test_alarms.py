"""What is said of an iteration that teaches nothing, and of an update beyond all bounds."""

import math

import pytest

from fastgrpo.run.failures import alarms


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "(A 0); look at the rewards' options and clips, or raise rollout.eta"),
        (1e9, "(A 1e+09); near 1e+09 a float32 has steps of 64: shift A to 0"),
        (-1e9, "(A -1e+09); near -1e+09 a float32 has steps of 64: shift A to 0"),
        (25.0, "(A 25); look at the rewards' options"),
    ],
)
def test_equal_rewards_are_explained(value: float, said: str) -> None:
    metrics = {"reward/A": value, "reward/M": 1e9}
    text = alarms.without_spread(metrics, {"A": 1.0, "M": 0.0}, 4)
    assert text.startswith(
        "nothing to learn from: the rewards of each prompt's 4 samples are equal"
    )
    assert said in text


@pytest.mark.parametrize(
    ("ratio", "told"),
    [(0.0, False), (0.3, False), (2e12, True), (math.inf, True), (math.nan, True)],
)
def test_only_an_update_beyond_all_bounds_is_told(ratio: float, told: bool) -> None:
    line = alarms.ratio_exploded({"update/max_log_ratio": ratio}, lr=1.0, clip_range=1e-4)
    assert (line is not None) == told and (line is None or "lower optimizer.lr=1" in line)


def test_a_monitor_without_scores_is_told_once() -> None:
    row = {alarms.EMPTY: 0.0, alarms.MONITORS: 3.0, "invalid/TA": 3.0, "invalid/VQ": 0.0}
    weights = {"VQ": 1.0, "TA": 0.0}
    (line,) = alarms.notes(row, {}, weights, 4, "why")
    assert line.startswith("parts of weight 0 lack scores (TA 3)") and line.endswith("; why")
    assert not alarms.notes(row, {"monitors_without_score": 3.0}, weights, 4, "why")
    assert alarms.shortfalls({"monitors_without_score": 3.0}, 1) == [
        "3 scores of parts of weight 0 are missing; their samples were trained on."
    ]


def test_a_run_is_summed_up_by_what_it_did_not_learn_from() -> None:
    assert alarms.shortfalls(alarms.of_run([{"reward/invalid": 0.0}]), 1) == []
    row = {"update/without_spread": 1.0, "reward/invalid": 3.0, "not_finite/pixels": 2.0}
    lines = alarms.shortfalls(alarms.of_run([row, row | {"update/skipped": 1.0}]), 2)
    assert lines == [
        "In 2 of 2 iterations the rewards of no prompt's samples differed, so that there was nothing "
        "to learn from: the run learned nothing.",
        "6 samples had no valid score and were left out, 4 of them since their latents or pixels were "
        "not finite.",
        "1 optimizer steps were skipped: their gradients were not finite.",
    ]
