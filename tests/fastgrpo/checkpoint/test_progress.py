"""A collapse of the policy: seen when it happens, and its checkpoint is never the best."""

import json
import random

import pytest

from fastgrpo.checkpoint.progress import Progress


def run(rewards: list[float], every: int = 1, suspect: int = -1, spread: bool = True) -> Progress:
    """The progress after these iterations, with a checkpoint after every so many.

    suspect: the iteration, from 0, whose update moved the policy beyond all bounds
    """
    progress = Progress()
    for iteration, reward in enumerate(rewards):
        progress.note(reward, spread)
        progress.suspect = iteration == suspect
        progress.iteration += 1
        if progress.iteration % every == 0:
            progress.close_span(f"step-{progress.iteration}")
        progress = Progress.read(json.loads(json.dumps(vars(progress))))  # a resume changes nothing
    return progress


def test_the_best_is_the_checkpoint_after_the_best_span() -> None:
    assert run([1.0, 2.0, 3.0, 1.5]).best == "step-3"
    assert run([1.0, 2.0, 3.0, 1.5], every=2).best == "step-4"


def test_the_checkpoint_of_the_iteration_that_exploded_is_not_the_best() -> None:
    """Step 7 ended the best span; the samples of its weights are worthless."""
    rewards = [1.0, 1.1, 1.2, 1.1, 1.3, 1.4, 1.5]
    assert run(rewards).best == "step-7"
    collapsed = run([*rewards, 0.1, 0.1, 0.1])
    assert collapsed.best == "step-6" and collapsed.fallen is not None


def test_an_update_beyond_all_bounds_is_no_best_before_anything_is_drawn() -> None:
    assert run([1.0, 1.1, 1.2], suspect=2).best == "step-2"
    assert run([1.0, 0.1], suspect=0).best is None, "also in the first iterations"
    recovered = run([1.0, 1.1, 1.2], suspect=1)
    assert recovered.best == "step-3" and not recovered.alarmed


def test_the_mean_of_a_span_with_a_collapse_is_no_best() -> None:
    """The first checkpoint is the best of all, but for the collapse in its span."""
    rewards = [1.0, 1.1, 1.0, 1.1, 1.0, 1.1, 0.1, 0.1]
    assert run([*rewards, *[0.1] * 8], every=8).best is None
    assert run([*rewards, *[1.0] * 8], every=8).best == "step-16", "the run has recovered"


def test_equal_rewards_below_all_earlier_ones_are_a_collapse() -> None:
    progress = Progress()
    assert not progress.note(1.0, True) and progress.note(0.5, False)
    assert not Progress().note(0.0, False), "a run whose rewards are always equal has not fallen"


@pytest.mark.parametrize("trend", [0.0, 0.05])
def test_changes_between_batches_of_prompts_are_no_collapse(trend: float) -> None:
    for seed in range(200):
        rng, progress = random.Random(seed), Progress()
        assert not any(progress.note(rng.gauss(trend * n, 0.1), True) for n in range(60)), seed


def test_progress_of_an_earlier_version_is_read() -> None:
    old = {"iteration": 3, "best_reward": 1.0, "best": "step-2", "rewards": [1.0], "gone": 1}
    assert Progress.read(old) == Progress(
        iteration=3, best_reward=1.0, best="step-2", rewards=(1.0,)
    )


def test_where_held_out_prompts_are_evaluated_the_best_is_the_best_of_them() -> None:
    """A training reward that rises, as a hacked one does, counts for nothing."""
    progress = Progress()
    progress.judge_by(True)
    for step, (training, heldout) in enumerate([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)], 1):
        progress.note(training, True)
        progress.note_heldout(heldout, f"step-{step}")
        progress.close_span(f"step-{step}")
        progress = Progress.read(json.loads(json.dumps(vars(progress))))
        progress.judge_by(True)
    assert (progress.best, progress.best_reward) == ("step-2", 3.0)
    assert progress.kept(True) == {"step-2"} and progress.rewards == ()


def test_a_best_checkpoint_that_could_not_be_saved_gives_way_to_the_one_before() -> None:
    progress = Progress()
    progress.judge_by(True)
    progress.note_heldout(1.0, "step-1")
    progress.close_span("step-1")
    progress.note_heldout(2.0, "step-2")
    assert progress.best_without("step-2") == (1.0, "step-1")
    assert progress.best_without("step-3") == (2.0, "step-2"), "which another save does not touch"


def test_another_way_to_choose_the_best_begins_anew() -> None:
    progress = run([1.0, 2.0])
    progress.judge_by(False)
    assert progress.best == "step-2"
    progress.judge_by(True)
    assert progress.best is None and progress.best_reward is None
