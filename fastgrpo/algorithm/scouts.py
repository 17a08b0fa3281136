"""Scouts: which of many cheap candidates are drawn again in full. Pure functions.

Sol-RL (arXiv 2604.06916): where the ODE draws, a sample's outcome is fixed by its initial noise, and
so survive few steps and few bits the ranks, if not the values, of its rewards.
"""

import torch
from torch import Tensor

from fastgrpo.algorithm.selection import best_of_n


def choose(scores: Tensor, valid: Tensor, keep: int) -> tuple[tuple[int, ...], ...]:
    """The keep / 2 best and the keep / 2 worst candidates of each prompt.

    Candidates without a score are taken where too few have one, the first ones first.

    scores: float32 [P, N];  valid: bool [P, N];  keep: even, at most N
    returns by prompt its `keep` candidates in increasing order
    """
    prompts, candidates = scores.shape
    extremes = best_of_n(scores.flatten(), valid.flatten(), candidates, keep)
    chosen = []
    for row in extremes.reshape(prompts, candidates).tolist():
        missing = keep - sum(row)
        others = [candidate for candidate, taken in enumerate(row) if not taken][:missing]
        taken = [candidate for candidate, of_extremes in enumerate(row) if of_extremes]
        chosen.append(tuple(sorted([*taken, *others])))
    return tuple(chosen)


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of two scores within prompts, pooled over prompts.

    one, other: float [P, M], NaN without a score;  returns NaN where a score does not differ
    """
    known = torch.isfinite(one) & torch.isfinite(other)
    a, b = (_centred(scores, known) for scores in (one, other))
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: the correlation of ranks within prompts, equal scores sharing their mean rank.

    one, other: float [P, M], NaN without a score;  returns NaN where all ranks are equal
    """
    known = torch.isfinite(one) & torch.isfinite(other)
    missing = torch.tensor(float("nan"), dtype=torch.float64)
    ranks = [
        torch.where(known, _ranks(torch.where(known, scores.double(), missing)), missing)
        for scores in (one, other)
    ]
    return correlation(*ranks)


def _centred(scores: Tensor, known: Tensor) -> Tensor:
    """Scores less their prompt's mean, 0 where not known.

    scores: float [P, M];  known: bool [P, M];  returns float64 [P, M]
    """
    values = torch.where(known, scores.double(), 0.0)
    mean = values.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, values - mean, 0.0)


def _ranks(scores: Tensor) -> Tensor:
    """Each score's rank in its row, NaN left out.  scores: float64 [P, M];  returns like scores"""
    own, others = scores.unsqueeze(2), scores.unsqueeze(1)
    return (others < own).sum(2).double() + 0.5 * (others == own).sum(2)
