"""Means of base and trained model by task, and their intervals over prompts.

Prompts are resampled within their task with all their images, since images of one prompt are not
independent; the overall score of a benchmark with tasks is the plain mean of the tasks' means, and
so is each of its resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgrpo.training.evaluation.evaluation import resampled_means

Floats = NDArray[np.float64]
CHUNKS = 10
"""Parts of a style, whose means' standard deviation HPS's program prints as its +-."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval; NaN: there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Both sides, and the paired difference, trained less base."""

    base: Estimate
    trained: Estimate
    difference: Estimate
    pairs: int
    """Images with a score on both sides; the others are left out."""
    prompts: int
    """Prompts with such an image."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A column's numbers."""

    overall: Estimates
    groups: Mapping[str, Estimates]
    """By task or style; empty where there is none."""
    missing: int
    """Images without a score on both sides."""
    also: Mapping[str, tuple[float, float]]
    """What the benchmark's own program prints, too: name -> base, trained."""


def measured(
    scores: Floats,
    prompts: Sequence[int],
    groups: Sequence[str],
    also: Mapping[str, tuple[float, float]],
) -> Measured:
    """The estimates of one column.

    scores: float64 [images, 2]: base, trained, NaN where invalid;  prompts: each image's prompt;
    groups: each image's task or style;  also: what the benchmark's program prints, too
    """
    numbers, names = np.asarray(prompts), np.asarray(groups)
    usable = np.isfinite(scores).all(1)
    each, draws = {}, []
    for seed, name in enumerate(dict.fromkeys(groups)):
        own = usable & (names == name)
        each[name], drawn = _group(scores[own], numbers[own], seed)
        draws.append(drawn)
    overall = each[""] if list(each) == [""] else _mean(list(each.values()), draws)
    return Measured(
        overall=overall,
        groups={} if list(each) == [""] else each,
        missing=int((~usable).sum()),
        also=also,
    )


def _group(scores: Floats, prompts: NDArray[np.int64], seed: int) -> tuple[Estimates, Floats]:
    """(the estimates of one group, its resampled means [RESAMPLES, 3]).

    scores: float64 [images, 2], finite
    """
    values = np.column_stack([scores, scores[:, 1] - scores[:, 0]])
    _, index = np.unique(prompts, return_inverse=True)
    counts = np.bincount(index).astype(np.float64)
    sums = [np.bincount(index, weights=column) for column in values.T]
    drawn = np.column_stack([resampled_means(own, counts, seed) for own in sums])
    means = values.mean(0) if len(values) else np.full(3, math.nan)
    return _estimates(means, drawn, len(values), len(counts)), drawn


def _mean(groups: Sequence[Estimates], draws: Sequence[Floats]) -> Estimates:
    """The plain mean over groups."""
    means = np.mean(
        [[one.base.mean, one.trained.mean, one.difference.mean] for one in groups], axis=0
    )
    pairs, prompts = sum(one.pairs for one in groups), sum(one.prompts for one in groups)
    return _estimates(means, np.mean(draws, axis=0), pairs, prompts)


def _estimates(means: Floats, drawn: Floats, pairs: int, prompts: int) -> Estimates:
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    each = [
        Estimate(mean=float(m), low=float(a), high=float(b))
        for m, a, b in zip(means, low, high, strict=True)
    ]
    return Estimates(
        base=each[0], trained=each[1], difference=each[2], pairs=pairs, prompts=prompts
    )


def geneval_extras(scores: Floats, prompts: Sequence[int]) -> dict[str, tuple[float, float]]:
    """What GenEval's program prints beside the tasks: shares of images and of prompts.

    scores: float64 [images, 2], 1 where correct
    """
    usable = np.isfinite(scores).all(1)
    right, numbers = scores[usable], np.asarray(prompts)[usable]
    if not len(right):
        return {}
    best = np.array([right[numbers == prompt].max(0) for prompt in np.unique(numbers)])
    return {
        "correct images": _pair(right.mean(0)),
        "prompts with a correct image": _pair(best.mean(0)),
    }


def hps_extras(scores: Floats, groups: Sequence[str]) -> dict[str, tuple[float, float]]:
    """HPS's +- of each style: the standard deviation of ten chunks' means.

    scores: float64 [images, 2];  only of a style all of whose images have a score and that divides
    """
    found, names = {}, np.asarray(groups)
    for name in dict.fromkeys(groups):
        own = scores[names == name]
        if np.isfinite(own).all() and len(own) % CHUNKS == 0:
            chunks = own.reshape(CHUNKS, -1, 2).mean(1)
            found[f"{name}: s.d. of {CHUNKS} chunks"] = _pair(chunks.std(0))
    return found


def _pair(values: Floats) -> tuple[float, float]:
    return float(values[0]), float(values[1])
