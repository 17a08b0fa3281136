"""The planner's share of a minibatch against the dealing that the update does."""

import pytest
import torch

from fastgrpo.algorithm import selection
from fastgrpo.core import config
from fastgrpo.tools.plan.workload.stragglers import idle, widest
from tests import ROOT


@pytest.mark.parametrize(
    ("prompts", "size", "kept", "updates", "groups"),
    [
        (
            32,
            12,
            12,
            4,
            64,
        ),  # t2v_hunyuan: six samples of a prompt on each rank, one or two in each minibatch
        (32, 12, 12, 4, 32),
        (32, 24, 8, 4, 64),
        (16, 12, 12, 1, 8),
        (10, 16, 8, 2, 3),
    ],
)
def test_the_group_with_the_most_is_the_updates(
    prompts: int, size: int, kept: int, updates: int, groups: int
) -> None:
    total, most, draws = prompts * size, 0, 20
    for seed in range(draws):
        chance = torch.Generator().manual_seed(seed)
        mask = torch.zeros(prompts, size, dtype=torch.bool)
        for row in mask:
            row[torch.randperm(size, generator=chance)[:kept]] = True
        for members in selection.minibatches(
            mask.flatten(), size, updates, ("minibatches", seed, 0)
        ):
            shares = (
                range(group * total // groups, (group + 1) * total // groups)
                for group in range(groups)
            )
            most += max(len(set(share) & set(members)) for share in shares)
    assert widest(prompts, size=size, kept=kept, updates=updates, groups=groups) == pytest.approx(
        most / draws, rel=0.06
    )


def test_what_does_not_divide_is_waited_for() -> None:
    # 2 in each of four minibatches, where 6 samples are there
    assert widest(32, size=12, kept=12, updates=4, groups=64) == 8.0
    assert widest(32, size=12, kept=12, updates=4, groups=32) == 12.0
    recipe = config.load(ROOT / "launch" / "t2v_hunyuan.toml", [])
    assert (idle(recipe, 64), idle(recipe, 32)) == (0.25, 0.0)
