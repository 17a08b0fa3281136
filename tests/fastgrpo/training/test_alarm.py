"""Monitors of held-out clips by closed form, and the alarm's rule on series made by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.training.evaluation import Evaluation
from fastgrpo.training.evaluation.alarm import Finding, judge, raised
from fastgrpo.training.evaluation.course import (
    Alarm,
    Course,
    clean,
    metrics,
    read_alarms,
    write_alarms,
)
from fastgrpo.training.evaluation.monitors import (
    cosine_to_others,
    distance_to_others,
    measure,
    thumbnail,
)
from tests.harness import runs

PROMPTS, SEEDS = 12, 2
LEVELS = np.random.default_rng(0).normal(size=PROMPTS).repeat(SEEDS)  # each prompt's own


def evaluation(
    iteration: int, reward: float = 0.0, sharpness: float = 0.0, grid: float = 0.0
) -> Evaluation:
    """Clips of twelve prompts whose scores are shifted; more of grid is worse.

    The prompts differ by a standard deviation of about 1 in the monitors, so that the interval of a
    mean over twelve is about 0.55 to either side, and clips of one evaluation by 0.1 more.
    """
    own = np.random.default_rng(iteration + 1).normal(size=(3, PROMPTS * SEEDS)) * 0.1
    shifts = zip(("A", "sharpness", "grid"), (reward, sharpness, grid), own, strict=True)
    return Evaluation(
        iteration=iteration,
        prompts=[f"prompt {n // SEEDS}" for n in range(PROMPTS * SEEDS)],
        seeds=[n % SEEDS for n in range(PROMPTS * SEEDS)],
        scores={part: (LEVELS + shift + noise).tolist() for part, shift, noise in shifts},
        weights={"A": 1.0, "sharpness": 0.0, "grid": 0.0},
        clips=[],
        worse_when_higher=["grid"],
    )


@pytest.mark.parametrize(
    ("moved", "risen", "fallen"),
    [
        ({"reward": 1.0}, True, set()),
        ({"reward": 1.0, "sharpness": -1.0}, True, {"sharpness"}),
        ({"reward": 1.0, "sharpness": 1.0}, True, set()),
        ({"reward": 1.0, "grid": 1.0}, True, {"grid"}),
        ({"reward": 1.0, "grid": -1.0}, True, set()),
        ({"reward": 1.0, "grid": 1.0, "sharpness": -1.0}, True, {"grid", "sharpness"}),
        ({"reward": -1.0, "sharpness": -1.0}, False, {"sharpness"}),
        ({"reward": 0.0, "sharpness": -1.0}, False, {"sharpness"}),
        ({"reward": 1.0, "sharpness": -0.3}, True, set()),  # sure, and within the prompts' spread
    ],
)
def test_what_has_risen_and_what_has_fallen(
    moved: dict[str, float], risen: bool, fallen: set[str]
) -> None:
    found = judge(evaluation(0), evaluation(8, **moved))
    assert found == Finding(risen, frozenset(fallen))
    assert found.hacked == (fallen if risen else set())


@pytest.mark.parametrize(("by", "fallen"), [(0.015, set()), (0.03, {"clipped"})])
def test_where_all_clips_agree_a_share_must_move_by_so_much(by: float, fallen: set[str]) -> None:
    """And a tenth of it: no interval has a width here."""
    before, after = evaluation(0), evaluation(8, reward=1.0)
    weights = before.weights | {"clipped": 0.0}
    one, other = (
        replace(
            of,
            scores=of.scores | {"clipped": [level] * PROMPTS * SEEDS},
            weights=weights,
            worse_when_higher=["clipped"],
        )
        for of, level in ((before, 0.0), (after, by))
    )
    assert judge(one, other).fallen == fallen


def test_a_monitor_without_scores_and_one_that_came_later_alarm_nobody() -> None:
    before, after = evaluation(0), evaluation(8, reward=1.0, sharpness=-1.0)
    nothing = {"sharpness": [math.nan] * PROMPTS * SEEDS}
    assert not judge(before, replace(after, scores=after.scores | nothing)).fallen
    first = replace(before, scores={"A": before.scores["A"]}, weights={"A": 1.0})
    assert judge(first, after) == Finding(True, frozenset())


def test_the_same_monitor_must_fall_in_each_of_the_last_evaluations() -> None:
    def of(*names: str, risen: bool = True) -> Finding:
        return Finding(risen, frozenset(names))

    assert raised([of("grid")], 2) == []
    assert raised([of("grid"), of("grid")], 2) == ["grid"]
    assert raised([of("grid"), of("clipped")], 2) == [], "one each"
    assert raised([of("grid"), of("grid"), of()], 2) == [], "it has recovered"
    assert raised([of("grid"), of("grid", risen=False), of("grid")], 2) == [], "no gain between"
    assert raised([of(), of("grid", "a"), of("a", "grid")], 2) == ["a", "grid"]
    assert raised([of("grid")], 1) == ["grid"] and raised([], 1) == []


def settings(folder: Path, *overrides: str) -> Recipe:
    own = [f"run.dir={folder}", "evaluate.every=2", "checkpoint.every=2", "run.iterations=20"]
    return config.load(runs.RECIPE, [*own, *overrides])


def course(folder: Path, *overrides: str) -> Course:
    """Two sound evaluations, then two of a hacked reward."""
    found = Course(recipe=settings(folder, *overrides), before=evaluation(0))
    for iteration, sharpness in ((2, 0.0), (4, 0.5), (6, -1.0), (8, -1.5)):
        found.add(evaluation(iteration, reward=iteration / 2, sharpness=sharpness))
    return found


def test_a_run_warns_stops_or_goes_back_by_recipe(tmp_path: Path) -> None:
    assert course(tmp_path, "evaluate.alarm=off").raised() == []
    assert course(tmp_path, "evaluate.alarm_after=3").raised() == []
    own = course(tmp_path, "evaluate.alarm=return", "evaluate.alarm_returns=2")
    assert own.raised() == ["sharpness"]
    first = own.answer(["sharpness"], 8, "step-4")
    assert (first.back_to, first.lr_factor) == (4, 0.5)
    own.alarms.append(first)
    second = own.answer(["sharpness"], 8, "step-4")
    assert (second.back_to, second.lr_factor) == (4, 0.25)
    own.alarms.append(second)
    assert own.answer(["sharpness"], 8, "step-4").back_to is None, "two returns were allowed"
    assert own.lr_factor == 0.25 and own.returns == 2
    assert course(tmp_path, "evaluate.alarm=return").answer(["grid"], 8, None).back_to is None
    for action in ("warn", "stop"):
        only = course(tmp_path, f"evaluate.alarm={action}").answer(["grid"], 8, "step-4")
        assert (only.action, only.back_to, only.lr_factor) == (action, None, 1.0)


def test_going_back_forgets_the_evaluations_of_the_way_back(tmp_path: Path) -> None:
    own = course(tmp_path)
    assert own.raised() == ["sharpness"]
    own.rewind(4)
    assert sorted(own.evaluations) == [2, 4] and own.raised() == []


def test_files_of_iterations_to_come_are_removed_and_returns_stay(tmp_path: Path) -> None:
    """As after a kill: the newest checkpoint is of 4 iterations."""
    own = course(tmp_path, "evaluate.alarm=return")
    (tmp_path / "evaluation").mkdir()
    for one in (own.before, *own.evaluations.values()):
        one.write(own.file(one.iteration))
        (tmp_path / "evaluation" / f"step-{one.iteration}").mkdir()
    went = Alarm(iteration=8, monitors=["grid"], action="return", back_to=4, lr_factor=0.5)
    warned = Alarm(iteration=8, monitors=["grid"], action="warn", lr_factor=0.5)
    write_alarms(tmp_path, [went, warned])
    own.file(2).write_text('{"iteration": 2,')
    notices = clean(own.recipe, 4)
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == [
        *("step-0", "step-0.json", "step-4", "step-4.json")
    ]
    assert notices == ["evaluation/step-2.json is damaged: removed, charts go without it"]
    assert read_alarms(tmp_path) == [went]
    again = Course.read(own.recipe, own.before, 4)
    assert list(again.evaluations) == [4] and again.lr_factor == 0.5


def test_the_numbers_of_an_evaluation_are_those_of_the_comparison() -> None:
    found = metrics(evaluation(0), evaluation(8, reward=1.0))
    assert found["heldout_change/sum"] == pytest.approx(1.0, abs=0.1)
    assert found["heldout_low/sum"] < found["heldout_change/sum"] < found["heldout_high/sum"]
    assert found["heldout/grid"] == pytest.approx(LEVELS.mean(), abs=0.1)


def test_distances_of_clips_by_closed_form() -> None:
    """Clips of one grey each: the distance of two is the difference of their greys."""
    greys = torch.tensor([[0, 51, 255], [102, 102, 102]])
    clips = greys.reshape(6, 1, 1, 1, 1).expand(6, 3, 40, 50, 3).to(torch.uint8)
    points = torch.stack([thumbnail(clip).flatten() for clip in clips])
    assert points.shape == (6, 3 * 3 * 32 * 32)
    expected = [(0.2 + 1) / 2, (0.2 + 0.8) / 2, (1 + 0.8) / 2, 0, 0, 0]
    assert distance_to_others(points, 3).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_mean_over_a_prompts_clips_is_the_mean_over_its_pairs() -> None:
    points = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    pairs = [(a - b).square().mean().sqrt() for n, a in enumerate(points) for b in points[:n]]
    mean = distance_to_others(points, 4).mean()
    assert mean.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-6)


def test_cosines_of_vectors_by_closed_form() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, -1.0]])
    assert cosine_to_others(vectors, 2).tolist() == pytest.approx([1, 1, 2, 2], abs=1e-6)
    half = 1 - 0.5**0.5
    three = cosine_to_others(vectors[:3], 3).tolist()
    assert three == pytest.approx([(1 + half) / 2, (1 + half) / 2, half], abs=1e-6)


def test_a_flat_clip_has_nothing_to_measure_and_a_tiled_one_is_a_grid() -> None:
    flat = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8)
    assert measure(flat, 16) == (0.0, 0.0, 1.0, 0.0)
    tile = torch.randint(0, 200, (8, 8, 3), generator=torch.Generator().manual_seed(0))
    tiled = tile.repeat(2, 4, 4, 1).to(torch.uint8).reshape(2, 32, 32, 3)
    sharpness, colourfulness, clipped, grid = measure(tiled, 8)
    assert sharpness > 100 and colourfulness > 0 and clipped < 0.02 and grid > 0.9
