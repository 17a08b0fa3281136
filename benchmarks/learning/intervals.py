"""Means of held-out clips and their 95 % intervals, over prompts and seeds at once.

A bootstrap: prompts are drawn with all their clips, and a run's seed with all that was learned from
it. Runs of the same seed, and the same clips, are compared with each other. Of n seeds a draw varies
by (n - 1) / n of what the mean of n runs does, two thirds for three, so its distance from their mean
is stretched by sqrt(n / (n - 1)). One seed cannot say how much another differs: of a single run the
interval is over prompts alone, as that of `training.evaluation.compare`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
LIMITS = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Gain:
    """Two means of held-out clips, and their paired difference with its 95 % interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Clips:
    """Scores of the same clips in evaluations of several runs."""

    prompts: Sequence[str]  # one per clip
    scores: Array  # [..., runs, clips], NaN where a clip has none

    @cached_property
    def _group(self) -> NDArray[np.intp]:
        """The number of each clip's prompt, [clips]"""
        names = list(dict.fromkeys(self.prompts))
        return np.array([names.index(prompt) for prompt in self.prompts])

    def _by_prompt(self, values: Array) -> Array:
        """Sums over each prompt's clips.  values: [..., clips];  returns [..., prompts]"""
        return values @ np.eye(self._group.max() + 1)[self._group]

    def mean(self) -> Array:
        """The mean of runs and clips.  returns [...]"""
        return np.asarray(np.nanmean(self.scores, axis=(-2, -1)))

    def resampled(self) -> Array:
        """The mean in RESAMPLES draws, the same ones whatever the scores.

        returns [RESAMPLES, ...]
        """
        usable = np.isfinite(self.scores)
        sums = self._by_prompt(np.where(usable, self.scores, 0.0))
        counts = self._by_prompt(usable.astype(np.float64))
        runs, prompts = sums.shape[-2:]
        generator = np.random.default_rng(0)
        drawn = generator.integers(prompts, size=(RESAMPLES, prompts))
        of_prompts = _counts(drawn, prompts)
        of_runs = _stretched(_counts(generator.integers(runs, size=(RESAMPLES, runs)), runs))
        total, number = (
            np.einsum("bp,...rp,br->b...", of_prompts, values, of_runs, optimize=True)
            for values in (sums, counts)
        )
        return np.asarray(total / np.maximum(number, 1 / RESAMPLES))


def _counts(drawn: NDArray[np.int64], of: int) -> Array:
    """How often each of so many was drawn.  drawn: [RESAMPLES, draws];  returns [RESAMPLES, of]"""
    return np.stack([(drawn == one).sum(1) for one in range(of)], axis=1).astype(np.float64)


def _stretched(counts: Array) -> Array:
    """Counts as weights whose spread is that of the mean of as many runs.  counts: [RESAMPLES, runs]"""
    runs = counts.shape[1]
    return 1 + (counts - 1) * np.sqrt(runs / max(1, runs - 1))


def paired(prompts: Sequence[str], before: Array, after: Array) -> Gain:
    """Clips' scores before and after, as one gain.

    prompts: one per clip;  before, after: [runs, clips] or [clips], NaN where a clip has no score
    """
    before, after = np.atleast_2d(before), np.atleast_2d(after)
    usable = np.isfinite(before) & np.isfinite(after)
    difference = Clips(prompts, np.where(usable, after - before, np.nan))
    low, high = np.percentile(difference.resampled(), LIMITS)
    first, last = float(before[usable].mean()), float(after[usable].mean())
    return Gain(first, after=last, difference=last - first, low=float(low), high=float(high))


def reached(spent: Array, reward: Array, goal: Array) -> Array:
    """What was spent when the reward first reached the goal, between evaluations; infinite if never.

    spent: [evaluations], ascending;  reward: [..., evaluations];  goal: [...];  returns [...]
    """
    above = reward >= goal[..., None]
    last = above.argmax(-1)
    first = np.maximum(last - 1, 0)
    low, high = (np.take_along_axis(reward, at[..., None], -1)[..., 0] for at in (first, last))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(last > 0, (goal - low) / (high - low), 0.0)
    found = spent[first] + share * (spent[last] - spent[first])
    return np.where(above.any(-1), found, np.inf)
