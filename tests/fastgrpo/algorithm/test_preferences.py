"""DPO's pairs and its loss, against closed forms and the forms in which others write it."""

import math

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm import objectives, selection
from fastgrpo.algorithm.objectives import Preferred
from fastgrpo.core.config import Objective

SHAPE = (3, 2, 1, 4, 5)
T = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


def drawn(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def errors(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared errors [B]."""
    return (v - target).square().flatten(1).mean(1)


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1, 1)


def test_pairs_are_the_best_with_the_worst_and_only_what_is_preferred() -> None:
    advantages = torch.tensor([0.1, 2.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 3.0, 1.0, -2.0, -4.0])
    selected = torch.ones(12, dtype=torch.bool)
    assert selection.pairs(advantages, selected, 4) == [(1, 2), (3, 0), (8, 11), (9, 10)]
    selected[[1, 9]] = False  # of three the middle one has no partner
    assert selection.pairs(advantages, selected, 4) == [(3, 2), (8, 11)]
    assert not selection.pairs(advantages, torch.zeros(12, dtype=torch.bool), 4)


def test_the_loss_of_the_initial_policy_is_log_2_and_has_a_gradient() -> None:
    better = torch.zeros(3, requires_grad=True)
    worse = torch.zeros(3, requires_grad=True)
    loss = objectives.dpo(Preferred(better=better, worse=worse, t=T), Objective(dpo_beta=40.0))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    loss.sum().backward()
    torch.testing.assert_close(better.grad, torch.full((3,), 10.0))  # beta / 4
    torch.testing.assert_close(worse.grad, torch.full((3,), -10.0))


@pytest.mark.parametrize("steps", [1, 25])
def test_other_conventions_are_other_betas(steps: int) -> None:
    """Sums over dimensions, and a derivation's factor T, as -log sigmoid written out."""
    v_w, v_l, u_w, u_l, r_w, r_l = drawn(6)
    beta, numel = 7.0, math.prod(SHAPE[1:])
    pairs = Preferred(
        better=errors(v_w, u_w) - errors(r_w, u_w), worse=errors(v_l, u_l) - errors(r_l, u_l), t=T
    )
    found = objectives.dpo(pairs, Objective(dpo_beta=beta))
    sums = [
        (v - u).square().flatten(1).sum(1) - (r - u).square().flatten(1).sum(1)
        for v, u, r in ((v_w, u_w, r_w), (v_l, u_l, r_l))
    ]
    theirs = beta / numel / steps  # scaled by the dimensions and the steps
    inner = -theirs * steps / 2 * (sums[0] - sums[1])
    torch.testing.assert_close(found, -torch.sigmoid(inner).log())


def test_the_noise_weighting_is_the_loss_on_predicted_noise() -> None:
    """e - x_0 is matched by v as the noise e by x + (1 - t) v: errors differ by (1 - t)^2."""
    x_w, x_l, e, v_w, v_l, r_w, r_l = drawn(7)
    t = column(T)

    def gap(x_0: Tensor, v: Tensor, r: Tensor, of_noise: bool) -> Tensor:
        x = (1 - t) * x_0 + t * e
        if of_noise:
            return errors(x + (1 - t) * v, e) - errors(x + (1 - t) * r, e)
        return errors(v, e - x_0) - errors(r, e - x_0)

    settings = Objective(dpo_beta=9.0, dpo_weighting="noise")
    pairs = Preferred(better=gap(x_w, v_w, r_w, False), worse=gap(x_l, v_l, r_l, False), t=T)
    of_noise = gap(x_w, v_w, r_w, True) - gap(x_l, v_l, r_l, True)
    expected = -torch.sigmoid(-9.0 / 2 * of_noise).log()
    torch.testing.assert_close(objectives.dpo(pairs, settings), expected)
