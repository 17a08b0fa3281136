"""Learning curves and ablations: intervals, what a recipe costs on each axis, and which runs count."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.learning import (
    ablations,
    arms,
    campaign,
    full_size,
    intervals,
    learning_curves,
    pictures,
)
from benchmarks.learning.campaign import Trained, Variant
from benchmarks.learning.intervals import Array, Clips
from fastgrpo import rewards
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.tools.report.run_data import Run, read_run
from fastgrpo.training import methods
from fastgrpo.training.evaluation import Evaluation, compare
from tests.harness.runs import RECIPE


def test_the_gain_and_its_interval_are_the_evaluations() -> None:
    generator = np.random.default_rng(3)
    prompts = [prompt for prompt in "abcdef" for _ in range(3)]
    before, after = generator.normal(size=(2, 18))
    after[4] = np.nan
    one, other = (
        Evaluation(
            iteration=n,
            prompts=prompts,
            seeds=[0] * 18,
            scores={"VQ": list(v)},
            weights={"VQ": 1.0},
            clips=[],
        )
        for n, v in enumerate((before, after))
    )
    expected: Any = compare(one, other)
    gain = intervals.paired(prompts, before, after)
    assert gain.difference == pytest.approx(expected["difference"]["VQ"])
    assert (gain.low, gain.high) == pytest.approx(tuple(expected["ci95"]["VQ"]))


def test_every_switch_of_the_ablations_is_a_recipe() -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for question in ablations.QUESTIONS:
        for variant in question.variants:
            recipe = config.load(RECIPE, [*ablations.COMMON, *variant.overrides])
            assert set(ablations.PARTS) <= set(recipe.weights), (
                "every part is scored, so that variants compare"
            )
            assert all(
                set(spec.weights) <= set(rewards.load(spec).names) for spec in recipe.rewards
            )
            assert seen.setdefault(variant.name, variant.overrides) == variant.overrides, (
                "one folder, one recipe"
            )
        of_question = {variant.name for variant in question.variants}
        for claim in question.claims:
            assert {claim.variant, claim.other or claim.variant} <= of_question
    for arm in arms.ARMS:
        methods.check(config.load(RECIPE, [*arms.COMMON, *arm.variant.overrides]))
    names = [arm.name for arm in arms.ARMS]
    assert len(set(names)) == len(names) and set(arms.USUAL) <= set(names)
    assert len(names) <= len(pictures.COLOURS)


def test_a_claim_shows_where_its_interval_has_its_sign(tmp_path: Path) -> None:
    """Runs of two seeds: one variant ends 0.5 above the other with both, the third by chance."""
    ends = {"base": (1.0, 1.2), "more": (1.5, 1.7), "unsure": (0.0, 2.5)}
    trained = [
        Trained(
            Variant(name, name),
            [
                run_of(tmp_path / f"{name}-{seed}", [], {0: 1.0, 1: end}, 1)
                for seed, end in enumerate(of_seeds)
            ],
            [],
        )
        for name, of_seeds in ends.items()
    ]
    rows = [
        ablations.Claim("x", name, other="base", sign=sign).row(trained)
        for name, sign in (("more", 1), ("more", -1), ("unsure", 1))
    ]
    assert [row[-1] for row in rows] == ["yes", "no, the contrary", "cannot be told"]
    assert rows[0][1:3] == ["+0.500", "+0.500 .. +0.500"], "runs of one seed are paired"
    assert ablations.Claim("x", "base", other=None, sign=1).row(trained)[1] == "+0.100"
    fewer = [trained[0], Trained(trained[1].variant, trained[1].runs[:1], [])]
    assert "ended early" in ablations.Claim("x", "more", other="base", sign=1).row(fewer)[1]


def test_tables_stand_between_their_markers() -> None:
    page = "above\n<!-- eta -->\nold\n<!-- end of eta -->\nbelow\n"
    assert ablations.put(page, "eta", "new") == page.replace("old", "new")
    with pytest.raises(UserError, match="lacks the markers '<!-- noise -->'"):
        ablations.put(page, "noise", "new")
    on_disk = (RECIPE.parent.parent / ablations.PAGE).read_text(encoding="utf-8")
    for question in ablations.QUESTIONS:
        ablations.put(on_disk, question.name, "")


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = config.load(RECIPE, [f"run.dir={tmp_path}", "run.iterations=3"])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    (tmp_path / "failed.txt").write_text("optimizer.max_skipped=3: too many\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 0, "reward/VQ": 0.5, "seconds/total": 2.0}\n'
    )
    told: list[str] = []
    assert campaign.ensure(recipe, told.append) == "optimizer.max_skipped=3: too many" and not told
    failed = Trained(
        Variant("v", "label"), [read_run(tmp_path)], ["optimizer.max_skipped=3: too many"]
    )
    assert "ended: optimizer.max_skipped=3: too many" in ablations.table(
        [failed], with_seconds=True
    )
    other = config.load(RECIPE, [f"run.dir={tmp_path}", "run.iterations=3", "rollout.eta=0.1"])
    with pytest.raises(UserError, match=r"a run of another recipe \(rollout\)"):
        campaign.ensure(other, told.append)


def test_the_interval_is_over_seeds_too() -> None:
    """Without spread among prompts it is that of a mean of three seeds; with one seed, the prompts'."""
    generator = np.random.default_rng(5)
    of_seed = np.array([0.0, 1.0, 5.0])
    prompts = [str(number) for number in range(40)]
    clips = Clips(prompts, np.repeat(of_seed[:, None], 40, axis=1))
    draws = clips.resampled()
    assert clips.mean() == pytest.approx(2.0) and draws.mean() == pytest.approx(2.0, abs=0.05)
    assert draws.std() == pytest.approx(of_seed.std(ddof=1) / np.sqrt(3), rel=0.03)
    of_prompt = generator.normal(size=40)
    together = Clips(prompts, of_seed[:, None] + of_prompt).resampled()
    variance = draws.var() + of_prompt.var() / 40
    assert together.var() == pytest.approx(variance, rel=0.05), "seeds and prompts add up"
    curve = Clips(prompts, np.stack([clips.scores, 2 * clips.scores])).resampled()
    np.testing.assert_allclose(curve[:, 1], 2 * curve[:, 0], err_msg="one draw for all evaluations")
    gain = intervals.paired(prompts, clips.scores, clips.scores + 1.0)
    assert (gain.low, gain.high) == pytest.approx((1.0, 1.0)), "runs of a seed are paired"


def test_the_cost_of_a_reward_lies_between_two_evaluations() -> None:
    spent = np.array([0.0, 10.0, 30.0])
    rewards_of = np.array([[1.0, 1.2, 1.6], [1.0, 1.2, 1.6], [1.0, 1.2, 1.6]])
    found = intervals.reached(spent, rewards_of, np.array([1.3, 0.9, 1.7]))
    assert list(found) == pytest.approx([15.0, 0.0, np.inf])


def run_of(
    folder: Path,
    overrides: list[str],
    rewards_at: dict[int, float],
    rows: int,
    noisy: bool = True,
) -> Run:
    """A run's folder with its curves alone: two prompts of one clip each."""
    (folder / "evaluation").mkdir(parents=True)
    recipe = config.load(RECIPE, [*overrides, f"run.dir={folder}", f"run.iterations={rows}"])
    (folder / "recipe.toml").write_text(recipe.to_toml())
    row = {"seconds/total": 2.0, "update/evaluations": 3.0}
    row |= {"rollout/evaluations": 5.0} if noisy else {}
    row |= {f"reward/{part}": 1.0 for part in learning_curves.PARTS}
    lines = [json.dumps({"iteration": at, **row}) for at in range(rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for iteration, value in rewards_at.items():
        scores = {part: [value / 3] * 2 for part in learning_curves.PARTS}
        Evaluation(
            iteration=iteration,
            prompts=["a", "b"],
            seeds=[0, 0],
            scores=scores,
            weights=dict.fromkeys(scores, 1.0),
            clips=[],
        ).write(folder / "evaluation" / f"step-{iteration}.json")
    return read_run(folder)


def test_a_table_has_every_axis_of_a_shorter_run(tmp_path: Path) -> None:
    """The second recipe has the first one's end, 2, after 2 of 8 iterations."""
    slow = run_of(tmp_path / "slow", [], {0: 1.0, 4: 1.5, 8: 2.0}, 8)
    quick = run_of(tmp_path / "quick", [], {0: 1.0, 4: 3.0}, 4)
    trained = [
        Trained(Variant("slow", "slow"), [slow, slow], [], pace=np.full(8, 3.0)),
        Trained(Variant("quick", "quick"), [quick, quick], [], pace=np.full(4, 1.0)),
    ]
    assert list(trained[0].evaluations()[:2]) == [14.0, 28.0], "5 forwards, 3 with a backward"
    lines = learning_curves.table(trained, [2.0, 2.0]).splitlines()
    assert lines[2] == (
        "| slow | 8 | 3.00 | +1.000 | +1.000 .. +1.000 | 24, 100% (100% .. 100%) "
        "| 112, 100% (100% .. 100%) | 1,024, 100% (100% .. 100%) |"
    )
    assert lines[3].endswith("| 2, 8% (8% .. 8%) | 28, 25% (25% .. 25%) | 256, 25% (25% .. 25%) |")
    lines = learning_curves.table(trained[::-1], [2.0, 2.0]).splitlines()
    assert lines[3].count("| never ") == 3
    lines = learning_curves.table(trained, [2.0, 2.0], given=1.5).splitlines()
    assert "| 12, 50% (50% .. 50%) |" in lines[2] and "| 1, 4% (4% .. 4%) |" in lines[3]
    costs: dict[str, list[Array]] = {
        axis: [np.arange(3.0), np.arange(2.0)] for axis in learning_curves.AXES
    }
    pictures.over_costs(trained, learning_curves.PARTS, costs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_what_no_metric_counts_is_an_evaluation_too(tmp_path: Path) -> None:
    """NFT's rollout, 10 prompts of 16 samples in 6 steps, and its initial policy."""
    run = run_of(tmp_path / "nft", [*arms.NFT], {0: 1.0, 1: 2.0}, 1, noisy=False)
    assert list(Trained(Variant("nft", "nft"), [run], []).evaluations()) == [960 + 3 * 4]


def full(*overrides: str) -> Any:
    """The full size's recipe for the demo's with these overrides."""
    return full_size.recipe_of(config.load(RECIPE, [*arms.COMMON, *overrides]))


def test_the_full_recipe_is_t2v_hunyuan_itself() -> None:
    assert full() == config.load(full_size.FULL)
    demo = config.load(RECIPE)
    planned = full_size.planned(demo)
    assert full_size.hours(demo) * 76 == pytest.approx(planned.seconds * 300 / 3600)


def test_switches_are_scaled_to_the_full_size() -> None:
    window = full(*arms.WINDOW).rollout
    assert (window.window, window.tail_steps) == (8, 8)  # 2 of 6 steps; 2 x 25 / 6
    assert window.window_every == 18  # 76 / 19 = 4 moves over 4 places: one pass of 17 in 300
    prompt = full(*arms.PER_PROMPT, "rollout.seeds_per_prompt=4")
    assert (prompt.rollout.window, prompt.rollout.seeds_per_prompt) == (1, 4)
    assert prompt.rollout.sampler == "linear" and prompt.objective.step_weights == "gradient"
    scouts = full(*arms.SCOUTS)
    assert scouts.samples_trained == scouts.rollout.samples_per_prompt == 12  # 8 of 8, not of 16
    assert (scouts.rollout.scouts, scouts.rollout.scout_steps) == (36, 12)
    assert scouts.optimizer.ema_decay == 0.5 and not full().optimizer.ema_decay
    fewer = full("objective.best_of_n=4", "optimizer.lr=5e-4", "run.iterations=38")
    assert (fewer.objective.best_of_n, fewer.rollout.samples_per_prompt) == (8, 12)  # 6, by fours
    assert fewer.optimizer.lr == pytest.approx(2e-5) and fewer.run.iterations == 150
    assert full("prompts.per_iteration=5").prompts.per_iteration == 16
    twice = full("optimizer.updates_per_iteration=2").optimizer
    assert twice.updates_per_iteration == 8


def test_switches_of_an_arm_that_is_not_asked_for_are_refused() -> None:
    arguments = ["--only", "full", "nft", "--switches", "nft", "objective.kind=nft"]
    given = learning_curves.parse(arguments)
    found = learning_curves.chosen(given.only, given.switches)
    assert [arm.variant.overrides for arm in found] == [(), ("objective.kind=nft",)]
    with pytest.raises(UserError, match="--switches awm: not among the recipes"):
        learning_curves.chosen(["full"], [["awm", "rollout.steps=4"]])
    ends = found[1].of_length(40).overrides
    assert ends == ("run.iterations=40", "optimizer.decay_updates=40", "objective.kind=nft")
