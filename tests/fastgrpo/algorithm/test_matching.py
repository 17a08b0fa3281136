"""AWM's pure functions against arithmetic, finite differences and what the clip must stop; and what
`advantage_clip` does to DiffusionNFT.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import objectives
from fastgrpo.algorithm.objectives import Matched, Noised
from fastgrpo.core.config import Objective

FORMS: dict[str, Callable[[float, float], float]] = {
    "uniform": lambda error, t: error,
    "t": lambda error, t: t * error,
    "t2": lambda error, t: t * t * error,
    "huber": lambda error, t: t * (math.sqrt(error + 1e-10) - 1e-5),
    "ghuber": lambda error, t: 4 * t * ((error + 1e-10) ** 0.25 - 1e-10**0.25),
}


def test_the_error_is_of_the_velocity_that_noised_the_sample() -> None:
    generator = torch.Generator().manual_seed(2)
    x_0, e, v = (torch.randn(3, 4, 5, generator=generator) for _ in range(3))
    t = torch.tensor([0.1, 0.5, 1.0])
    x = (1 - t.reshape(3, 1, 1)) * x_0 + t.reshape(3, 1, 1) * e
    expected = ((v - (e - x_0)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(objectives.matching_error(x, x_0=x_0, t=t, v=v), expected)
    nothing = objectives.matching_error(x, x_0=x_0, t=t, v=e - x_0)
    assert nothing.abs().max() < 1e-10


@pytest.mark.parametrize("weighting", FORMS)
def test_log_probabilities_are_their_forms_and_rise_as_the_error_falls(weighting: str) -> None:
    error = torch.tensor([1e-4, 0.3, 2.0], requires_grad=True)
    t = torch.tensor([0.9, 0.2, 1.0])
    found = objectives.matching_log_prob(error, t, weighting)
    for row in range(3):
        plain = -FORMS[weighting](error[row].item(), t[row].item())
        assert found[row].item() == pytest.approx(plain, rel=1e-5, abs=1e-7)
    (slope,) = torch.autograd.grad(found.sum(), error)
    form, step = FORMS[weighting], 1e-6
    for row in range(3):
        value, time = error[row].item(), t[row].item()
        difference = (form(value + step, time) - form(value - step, time)) / (2 * step)
        assert slope[row].item() == pytest.approx(-difference, rel=1e-3)
    exact = objectives.matching_log_prob(torch.zeros(1), torch.ones(1), weighting)
    assert exact.item() == pytest.approx(0.0, abs=1e-7)  # the largest: a sample that is matched


def test_every_weighting_of_a_recipe_has_a_form() -> None:
    field = Objective.model_fields["awm_weighting"].annotation
    assert set(field.__args__) == set(FORMS)  # type: ignore[union-attr]


def matched(log_ratio: Tensor, advantage: float) -> Matched:
    old = torch.full_like(log_ratio, -3.0)
    return Matched(
        log_prob=old.detach() + log_ratio,
        old_log_prob=old,
        advantage=torch.full_like(log_ratio, advantage),
    )


@pytest.mark.parametrize("advantage", [1.5, -2.0])
def test_the_clip_stops_what_went_far_enough_and_nothing_else(advantage: float) -> None:
    """Beyond the range there is no gradient where the sample's advantage would go further."""
    log_ratio = torch.tensor([-0.3, -0.05, 0.0, 0.05, 0.3], requires_grad=True)
    settings = Objective(kind="awm", clip_range=0.1)
    given = matched(log_ratio, advantage)
    loss = objectives.awm(given, settings)
    plain = [
        max(-advantage * r, -advantage * min(max(r, 0.9), 1.1))
        for r in log_ratio.detach().exp().tolist()
    ]
    assert loss.tolist() == pytest.approx(plain, rel=1e-5)
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    stopped = [False, False, False, False, True] if advantage > 0 else [True] + [False] * 4
    assert [value == 0.0 for value in slope.tolist()] == stopped
    free = torch.tensor(stopped).logical_not()
    expected = -advantage * log_ratio.detach().exp()
    torch.testing.assert_close(slope[free], expected[free])
    assert objectives.outside_matched(given, settings).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("most", [1.0, 2.0, 5.0])
def test_the_clip_of_advantages_sets_nfts_contrast_and_its_pull_back(most: float) -> None:
    """The gradient at v_old is that of the clipped advantage; the pull back to v_old, which a sample
    of advantage 0 alone has, is proportional to the clip. So a smaller one contrasts more.

    By hand, with x_0 = (1, 1), v_old = 0 and v = (d, -d), which leaves both widths at 1.
    """
    x, x_0, v_old, t = torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1)

    def slope(v: Tensor, advantage: float) -> list[float]:
        v.requires_grad_()
        given = Noised(x=x, x_0=x_0, t=t, v=v, v_old=v_old, advantage=torch.tensor([advantage]))
        (found,) = torch.autograd.grad(objectives.nft(given, Objective(advantage_clip=most))[0], v)
        return found.flatten().tolist()

    for advantage in (0.5, 1.0, 3.0):
        assert slope(torch.zeros(1, 2), advantage) == pytest.approx([min(advantage, most)] * 2)
    assert slope(torch.tensor([[0.1, -0.1]]), 0.0) == pytest.approx([0.1 * most, -0.1 * most])
