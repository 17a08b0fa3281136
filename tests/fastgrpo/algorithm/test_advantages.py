"""Advantages, Best-of-N, the choice of timesteps, the objective: against plain loops and closed
forms.
"""

import math
import statistics

import pytest
import torch

from fastgrpo.algorithm import noise, selection
from fastgrpo.algorithm.advantages import (
    combined_advantages,
    group_advantages,
    largest_std_advantages,
)
from fastgrpo.core.config import Objective

NAN = float("nan")


def test_group_advantages_equal_statistics_of_each_group() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 10.0, 20.0, 60.0])
    advantages = group_advantages(rewards, 3).tolist()
    for start in (0, 3):
        group = rewards[start : start + 3].tolist()
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert advantages[start : start + 3] == pytest.approx(
            [(r - mean) / std for r in group], rel=1e-5
        )


def test_invalid_samples_are_left_out_of_the_statistics() -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, 8.0, 5.0, 5.0, NAN, NAN])
    advantages = group_advantages(rewards, 4)
    expected = group_advantages(torch.tensor([1.0, 3.0, 8.0]), 3)
    torch.testing.assert_close(advantages[[0, 2, 3]], expected)
    assert advantages[1] == 0.0
    assert advantages[4:].tolist() == [0.0] * 4  # no spread among the valid ones


def test_a_group_with_one_valid_sample_teaches_nothing() -> None:
    assert group_advantages(torch.tensor([NAN, 7.0, NAN]), 3).tolist() == [0.0] * 3


def test_almost_no_spread_is_not_blown_up() -> None:
    rewards = torch.tensor([0.5, 0.5 + 1e-7, 0.5 - 1e-7])
    assert group_advantages(rewards, 3, min_spread=1e-6).tolist() == [0.0] * 3


def test_advantages_are_summed_not_rewards() -> None:
    scores = {"large": torch.tensor([0.0, 100.0, 200.0]), "small": torch.tensor([0.3, 0.1, 0.2])}
    valid = torch.ones(3, dtype=torch.bool)
    total = combined_advantages(scores, valid, {"large": 1.0, "small": 2.0}, 3, Objective())
    torch.testing.assert_close(total, torch.tensor([-1.0 + 2.0, 0.0 - 2.0, 1.0 + 0.0]))
    clamped = combined_advantages(
        scores, valid, {"large": 1.0, "small": 2.0}, 3, Objective(advantage_clip=0.5)
    )
    assert clamped.abs().max() == 0.5


def test_weight_zero_is_a_monitor() -> None:
    scores = {"trained": torch.tensor([0.0, 1.0]), "watched": torch.tensor([5.0, -5.0])}
    valid = torch.ones(2, dtype=torch.bool)
    total = combined_advantages(scores, valid, {"trained": 1.0, "watched": 0.0}, 2, Objective())
    torch.testing.assert_close(total, group_advantages(scores["trained"], 2))


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two rewards of four groups of three: one group has no spread, one sample is invalid."""
    scores = {
        "large": torch.tensor(
            [0.0, 100.0, 400.0, 7.0, 7.0, 7.0, 10.0, NAN, 30.0, -50.0, 0.0, 90.0]
        ),
        "small": torch.tensor([0.3, 0.1, 0.2, 0.5, 0.5, 0.5, 0.0, 0.9, 0.4, 0.2, 0.1, 0.6]),
    }
    return scores, torch.isfinite(scores["large"])


def combined(normalise: str, min_spread: float = 1e-6) -> torch.Tensor:
    scores, valid = batch()
    return combined_advantages(
        scores,
        valid,
        {"large": 1.0, "small": 2.0},
        3,
        Objective(advantage_clip=100.0, min_spread=min_spread, normalise=normalise),
    )


@pytest.mark.parametrize("normalise", ["group", "batch", "largest_std", "global"])
def test_invalid_samples_and_rewards_without_spread_teach_nothing_in_any_normalisation(
    normalise: str,
) -> None:
    advantages = combined(normalise)
    assert advantages[7] == 0.0 and torch.isfinite(advantages).all()
    # which has no groups: a prompt that is always as good as its samples are alike
    if normalise != "global":
        assert advantages[3:6].tolist() == [0.0] * 3
    assert not combined(normalise, min_spread=1e6).any()
    scores, valid = {"r": torch.ones(4)}, torch.ones(4, dtype=torch.bool)
    assert not combined_advantages(
        scores, valid, {"r": 1.0}, 2, Objective(normalise=normalise)
    ).any()


def test_batch_normalisation_has_mean_0_and_std_1_whatever_the_number_of_rewards() -> None:
    advantages = combined("batch")
    taught = [0, 1, 2, 6, 8, 9, 10, 11]
    assert advantages[taught].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert advantages[taught].std().item() == pytest.approx(1.0)
    # GDPO: of the sum of each reward's own advantages
    ratio = advantages[taught] / combined("group")[taught]
    torch.testing.assert_close(ratio, ratio[:1].expand(8))


def test_the_largest_groups_std_divides_all_groups() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 0.0, 10.0, 20.0, 5.0, 5.0, NAN])
    advantages = largest_std_advantages(rewards, 3)
    torch.testing.assert_close(
        advantages, torch.tensor([-0.1, 0.0, 0.1, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    )
    alone = largest_std_advantages(rewards[3:6], 3)
    torch.testing.assert_close(alone, group_advantages(rewards[3:6], 3))
    summed = combined("largest_std")
    scores, valid = batch()
    large, small = (largest_std_advantages(scores[part], 3, valid) for part in ("large", "small"))
    torch.testing.assert_close(summed, large + 2 * small)


def test_global_normalisation_sums_rewards_and_knows_no_prompts() -> None:
    scores, valid = batch()
    total = (scores["large"] + 2 * scores["small"])[valid]
    torch.testing.assert_close(combined("global")[valid], (total - total.mean()) / total.std())


def test_best_of_n_keeps_the_extremes_of_each_prompt() -> None:
    advantages = torch.tensor([0.1, 0.9, -0.5, 0.0, 0.3, -0.9, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    valid = torch.ones(12, dtype=torch.bool)
    kept = selection.best_of_n(advantages, valid, 6, 4)
    assert kept.nonzero().flatten().tolist() == [1, 2, 4, 5, 6, 7, 10, 11]
    valid[1] = False
    assert selection.best_of_n(advantages, valid, 6, 4)[:6].nonzero().flatten().tolist() == [
        0,
        2,
        4,
        5,
    ]


@pytest.mark.parametrize(("choice", "expected"), [("first", [0, 1, 2]), ("last", [6, 7, 8])])
def test_fixed_timesteps(choice: str, expected: list[int]) -> None:
    assert selection.choose_timesteps(range(9), 3, choice, ("key",)) == expected


def test_random_timesteps_are_uniform_and_never_the_last() -> None:
    counts = [0] * 10
    for sample in range(3000):
        steps = selection.choose_timesteps(range(9), 6, "random", ("timesteps", sample))
        assert len(set(steps)) == 6
        for step in steps:
            counts[step] += 1
    assert counts[9] == 0
    expected = 3000 * 6 / 9
    deviation = math.sqrt(3000 * (6 / 9) * (3 / 9))
    assert all(abs(count - expected) < 5 * deviation for count in counts[:9])


def test_minibatches_are_balanced_over_prompts_and_disjoint() -> None:
    kept = torch.ones(24, dtype=torch.bool)
    batches = selection.minibatches(kept, 8, 4, ("minibatches", 0, 0))
    assert sorted(index for batch in batches for index in batch) == list(range(24))
    for batch in batches:
        assert [sum(index // 8 == prompt for index in batch) for prompt in range(3)] == [2, 2, 2]
        assert all(
            sum(start <= index < start + 4 for index in batch) == 1 for start in range(0, 24, 4)
        )
    assert selection.minibatches(kept, 8, 4, ("minibatches", 0, 0)) == batches
    assert selection.minibatches(kept, 8, 4, ("minibatches", 0, 1)) != batches


def test_noise_is_a_function_of_its_key() -> None:
    one = noise.normal([("a", 1), ("a", 2)], (5,))
    assert torch.equal(one[1:], noise.normal([("a", 2)], (5,)))
    assert not torch.equal(one[0], one[1])
    assert sorted(noise.permutation(50, ("p",))) == list(range(50))
    large = noise.normal([("s", index) for index in range(200)], (500,))
    assert abs(large.mean().item()) < 0.02 and abs(large.std().item() - 1) < 0.02
    assert abs(torch.corrcoef(large[:2])[0, 1].item()) < 0.2
