"""Binary parts of a reward: exact at the value, invalid where the score is, and nothing else
changed.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards.common import threshold
from fastgrpo.rewards.serving import judge


class Table(Reward):
    """Gives the scores that it is made of, whatever it is shown."""

    names: tuple[str, ...] = ()
    fingerprint = "of the table"

    def __init__(self, values: dict[str, list[float]], valid: list[bool] | None = None) -> None:
        self.names = tuple(values)
        self.scores = Scores(
            {part: torch.tensor(scores) for part, scores in values.items()},
            torch.tensor(valid if valid is not None else [True] * len(next(iter(values.values())))),
        )
        self.network = torch.nn.Linear(1, 1)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        return self.scores

    def modules(self) -> Sequence[torch.nn.Module]:
        return (self.network,)


PIXELS = torch.zeros(5, 1, 8, 8, 3, dtype=torch.uint8)


def judged(table: Table, thresholds: dict[str, float]) -> Scores:
    return threshold.wrap(table, thresholds)(PIXELS, [""] * 5, 8.0)


def test_the_value_itself_counts_as_reached() -> None:
    # the first is 0.28 in float32, the second its next number
    below, over = (
        math.nextafter(0.28, 0.0),
        0.28000003,
    )
    scores = judged(Table({"HPS": [0.27999998, below, 0.28, over, -1.0]}), {"HPS": 0.28})
    assert scores.values["HPS_above"].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert scores.values["HPS_above"].dtype == torch.float32


def test_other_parts_stay_and_several_parts_have_their_own_values() -> None:
    table = Table(
        {"VQ": [1.0, 2.0, 3.0, 4.0, 5.0], "MQ": [5.0, 4.0, 3.0, 2.0, 1.0], "TA": [0.0] * 5}
    )
    wrapped = threshold.wrap(table, {"VQ": 3.0, "MQ": 4.0})
    assert wrapped.names == ("VQ", "MQ", "TA", "VQ_above", "MQ_above")
    scores = wrapped(PIXELS, [""] * 5, 8.0)
    assert scores.values["VQ_above"].tolist() == [0, 0, 1, 1, 1]
    assert scores.values["MQ_above"].tolist() == [1, 1, 0, 0, 0]
    for part in table.names:
        assert torch.equal(scores.values[part], table.scores.values[part])
    # the wrapped reward's own result is left alone
    assert sorted(table.scores.values) == [
        "MQ",
        "TA",
        "VQ",
    ]


def test_an_invalid_score_is_neither_above_nor_below() -> None:
    nan, inf = float("nan"), float("inf")
    scores = judged(
        Table({"HPS": [0.9, nan, inf, 0.9, 0.1]}, [True, True, True, False, True]), {"HPS": 0.5}
    )
    assert scores.values["HPS_above"].isnan().tolist() == [False, True, True, True, False]
    assert scores.valid.tolist() == [True, True, True, False, True]
    assert (
        threshold.wrap(Table({"HPS": [nan]}), {"HPS": -1e30})(PIXELS, [""], 8.0)
        .values["HPS_above"]
        .isnan()
        .all()
    )


def test_an_invalid_clip_stays_so_through_judge_batch() -> None:
    reward = threshold.wrap(Table({"HPS": [0.9, float("nan")]}), {"HPS": 0.5})
    scores = judge.judge_batch(reward, PIXELS[:2], ["", ""], 8.0)
    assert scores.valid.tolist() == [True, False]
    assert scores.values["HPS_above"].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("parts", "thresholds", "said"),
    [
        (
            ["VQ", "MQ"],
            {"VO": 1.0},
            "rewards.threshold.VO: the reward has no part 'VO'; its parts are VQ, MQ.",
        ),
        (
            ["VQ", "VQ_above"],
            {"VQ": 1.0},
            "rewards.threshold.VQ: the reward has a part 'VQ_above' of its own",
        ),
    ],
)
def test_a_part_that_cannot_be_is_refused(
    parts: list[str], thresholds: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        threshold.wrap(Table({part: [0.0] for part in parts}), thresholds)


def test_weights_move_and_the_fingerprint_knows_the_values() -> None:
    table = Table({"HPS": [0.0]})
    wrapped = threshold.wrap(table, {"HPS": 0.28})
    assert isinstance(wrapped, threshold.Thresholded)
    assert wrapped.modules() == (table.network,)
    others = [threshold.wrap(Table({"HPS": [0.0]}), {"HPS": value}) for value in (0.28, 0.29)]
    prints = [each.fingerprint for each in (wrapped, *others)]
    assert prints[0] == prints[1] != prints[2]
    plain = threshold.Thresholded(rewards.load(rewards.plain("tiny_world")), {"VQ": 0.5})
    assert plain.modules() == ()
    assert plain.fingerprint == ""


def test_load_applies_the_spec() -> None:
    spec = RewardSpec(
        name="video_stats",
        weights={"sharpness_above": 1.0},
        threshold={"sharpness": 5.0, "motion": 0.0},
    )
    reward = rewards.load(spec)
    assert reward.names[-2:] == ("sharpness_above", "motion_above")
    flat = torch.full((1, 2, 32, 32, 3), 128, dtype=torch.uint8)
    noisy = torch.randint(
        0, 255, (1, 2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    scores = reward(torch.cat([flat, noisy]), ["", ""], 8.0)
    assert scores.values["sharpness_above"].tolist() == [0.0, 1.0]
    assert scores.values["motion_above"].tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match="no part 'HPS'"):
        rewards.load(RewardSpec(name="video_stats", weights={}, threshold={"HPS": 0.28}))
