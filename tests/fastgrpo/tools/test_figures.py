"""The report's figures of held-out clips: right by closed form, shown, and fitting a telephone."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastgrpo.tools.report import figures
from fastgrpo.tools.report.distributions import best_of_n, by_prompt, histogram, mean_best_of_n
from fastgrpo.tools.report.report import write_report
from fastgrpo.tools.report.run_data import read_run
from fastgrpo.training.evaluation import Evaluation
from fastgrpo.training.evaluation.course import Alarm, metrics, write_alarms
from tests.fastgrpo.tools.test_report import PARTS, Page, fake_evaluation, fake_run

ITERATIONS, EVERY = 60, 20
MONITORS = ("sharpness", "grid", "distance")


def fake_course(folder: Path) -> Path:
    """A finished run with evaluations after each twenty iterations: the reward rises, the seeds
    become alike, and a grid appears, at which it warned.
    """
    fake_run(folder, ITERATIONS)
    rng = np.random.default_rng(1)
    for iteration in (20, 40):
        fake_evaluation(folder, iteration, 0.5 + iteration / 240, rng)
    found = {}
    for iteration in range(0, ITERATIONS + 1, EVERY):
        file = folder / "evaluation" / f"step-{iteration}.json"
        content = json.loads(file.read_text())
        count = len(content["prompts"])
        levels = {"sharpness": 130.0, "grid": 0.005 + 0.001 * iteration, "distance": 0.2}
        levels["distance"] -= 0.002 * iteration
        for part, level in levels.items():
            content["scores"][part] = (level * (1 + 0.1 * rng.normal(size=count))).tolist()
        content["weights"] |= dict.fromkeys(levels, 0.0)
        content["worse_when_higher"] = ["grid"]
        file.write_text(json.dumps(content))
        found[iteration] = Evaluation.read(file)
    with (folder / "metrics.jsonl").open("a") as lines:
        for iteration in (20, 40, 60):
            row = {"iteration": iteration - 1, **metrics(found[0], found[iteration])}
            lines.write(json.dumps(row) + "\n")
    alarm = Alarm(iteration=60, monitors=["grid", "distance"], action="warn")
    write_alarms(folder, [alarm])
    (folder / "summary.json").write_text(
        json.dumps(json.loads((folder / "summary.json").read_text()) | {"evaluations": {}})
    )
    return folder


@pytest.fixture(scope="module")
def on_the_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_course(tmp_path_factory.mktemp("runs") / "t2v_tiny")


def test_the_page_has_strips_curves_and_distributions(on_the_way: Path) -> None:
    text = write_report(on_the_way).read_text()
    page = Page(text)
    stills = page.all("img")
    assert len(stills) == 4 * 4 and all((one["src"] or "").startswith("data:") for one in stills)
    assert stills[1]["alt"] == "after 20 iterations: a red circle moves left slowly"
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    for part in ("sum", *MONITORS):
        assert any(label.startswith(f"Held-out {part} at 4 evaluations") for label in labels), part
    assert "Histogram of the held-out reward of 8 clips" in labels
    assert "Expected best held-out reward of 1 to 2 clips of a prompt" in labels
    (distance,) = [label for label in labels if label.startswith("Mean distance between the seeds")]
    run = read_run(on_the_way)
    first, last = (run.evaluations[n].scores["distance"].mean() for n in (0, -1))
    assert distance.endswith(f"4 prompts, distance: {first:.3g} before, {last:.3g} after")
    assert "grid (monitor: more is worse)" in page.words
    assert "distance (monitor: less is worse)" in page.words
    assert "Alarm after 60 iterations: grid and distance got worse" in page.words


def test_intervals_of_the_curves_are_those_of_the_metrics(on_the_way: Path) -> None:
    run = read_run(on_the_way)
    (card,) = re.findall(r'aria-label="Held-out distance at.*?</svg>', figures.course(run))
    lines = re.findall(r'<line class="thin" x1="([\d.]+)".*? y1="([\d.]+)" y2="([\d.]+)"/>', card)
    rings = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5.5">', card)
    assert len(lines) == 3 and len(rings) == 4, "the evaluation before has no change"
    row = next(row for row in run.rows if row["iteration"] == 39)
    (x, low, high), (cx, cy) = (np.array(one, dtype=float) for one in (lines[1], rings[2]))
    assert x == cx
    exact = [row[f"heldout_{name}/distance"] for name in ("low", "high", "change")]
    share = (exact[2] - exact[0]) / (exact[1] - exact[0])
    assert (low - cy) / (low - high) == pytest.approx(share, abs=0.02)


def test_a_run_without_evaluations_on_the_way_has_no_strips(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run"))
    assert figures.strips(run) == figures.course(run) == "" and figures.alarms(run) == []
    assert "Histogram" in figures.distributions(run) and "seeds of" not in figures.distributions(
        run
    )


def test_warnings_are_told_once(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", iterations=3, finished=False))
    warned = [Alarm(iteration=n, monitors=["grid"], action="warn") for n in (4, 8, 12)]
    back = Alarm(iteration=10, monitors=["grid"], action="return", back_to=4, lr_factor=0.5)
    write_alarms(run.folder, [*warned[:2], back, warned[2]])
    assert figures.alarms(run) == [
        figures.alarm_line(warned[0]),
        figures.alarm_line(back),
        "It warned 3 times, last after 12 iterations.",
    ]


def test_what_an_alarm_led_to_is_told() -> None:
    back = Alarm(iteration=8, monitors=["grid"], action="return", back_to=4, lr_factor=0.25)
    assert figures.alarm_line(back).endswith("went back to 4 iterations, with 0.25 of the rate.")
    for action in ("stop", "return"):
        ended = figures.alarm_line(Alarm(iteration=8, monitors=["grid"], action=action))
        assert ended.endswith("the run was ended.")


def test_the_best_of_n_is_the_mean_over_all_choices() -> None:
    values = np.random.default_rng(0).normal(size=5)
    curve = best_of_n(values)
    for n in range(1, 6):
        chosen = [max(some) for some in itertools.combinations(values, n)]
        assert curve[n - 1] == pytest.approx(np.mean(chosen), rel=1e-12)


def test_prompts_count_alike_and_as_far_as_all_have_clips() -> None:
    prompts, values = ["a", "a", "a", "b", "b"], np.array([0.0, 1.0, 2.0, 10.0, np.nan])
    assert {name: own.tolist() for name, own in by_prompt(prompts, values).items()} == {
        "a": [0.0, 1.0, 2.0],
        "b": [10.0],
    }
    assert mean_best_of_n(prompts, values).tolist() == [5.5]
    assert len(mean_best_of_n(prompts, np.full(5, np.nan))) == 0


def test_a_histogram_counts_each_finite_value_once() -> None:
    values = np.append(np.random.default_rng(0).normal(size=50), np.nan)
    drawn = histogram("h", "reward", [("before", "before", values), ("after", "sum", values + 1)])
    counts = [int(n) for n in re.findall(r": (\d+) clips from", drawn)]
    assert sum(counts) == 100
    assert "No values yet" in histogram("h", "reward", [("before", "before", np.full(3, np.nan))])


def test_at_most_ten_stills_with_both_ends() -> None:
    every = [Evaluation_(iteration) for iteration in range(0, 300, 10)]
    shown = figures.spread(every)  # type: ignore[arg-type]
    places = [one.iteration for one in shown]
    assert len(places) == figures.MOST_STILLS and places[0] == 0 and places[-1] == 290
    assert len(set(np.diff(places))) <= 2


class Evaluation_:
    """An evaluation of which only the iteration counts."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration


def test_the_parts_of_the_recipe_are_no_monitors(on_the_way: Path) -> None:
    run = read_run(on_the_way)
    assert set(run.monitors) == set(MONITORS) and run.monitors["grid"]
    compared = dict.fromkeys(MONITORS, 0.0)
    bounds = {"sharpness": [-3.0, -1.0], "grid": [1.0, 3.0], "distance": [1.0, 3.0]}
    summary = {key: {"sum": 0.0} | compared for key in ("before", "after", "difference")}
    told = replace(run, summary=summary | {"ci95": {"sum": [0.0, 0.0]} | bounds})
    assert [told.verdict(part) for part in MONITORS] == ["down", "down", "flat"]
    assert not set(PARTS) & set(run.monitors)
