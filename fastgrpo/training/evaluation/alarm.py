"""The alarm on reward hacking: the trained reward rises on held-out prompts while a monitor falls.

Each evaluation is compared with the one before training, clip by clip. The reward has risen where
the 95 % interval of its change lies above 0. A monitor has fallen where that interval lies on the
side that is worse, and the change matters: the mean has left the 95 % interval that it had itself
before training, and has moved by a tenth of its size, and a share of the pixels by LEAST_SHARE. For
on paired clips the smallest drift is significant, and where all clips agree no interval has a
width. Where the same monitor has fallen in K evaluations in a row, and the reward has risen in
each, the alarm is raised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.training.evaluation.evaluation import Evaluation, compare, mean_interval

LEAST = 0.1  # of a monitor's mean before training, that it must have moved by
LEAST_SHARE = 0.02  # that a monitor which is a share, from 0 to 1, must have moved by
SHARES = ("clipped", "grid")


@dataclass(frozen=True)
class Finding:
    """An evaluation compared with the one before training."""

    risen: bool  # the trained reward
    fallen: frozenset[str]  # the monitors that got worse

    @property
    def hacked(self) -> frozenset[str]:
        """The monitors that have fallen while the reward rose."""
        return self.fallen if self.risen else frozenset()


def judge(before: Evaluation, after: Evaluation) -> Finding:
    """Compare an evaluation with the one before training, of the same prompts and seeds."""
    compared = compare(before, after)
    change, means = compared["ci95"], compared["after"]
    fallen = set()
    for part in [part for part in change if after.weights.get(part) == 0]:
        sign = -1.0 if part in after.worse_when_higher else 1.0
        bounds = [sign * bound for bound in mean_interval(before, part)]
        lowest, highest = min(bounds), max(sign * bound for bound in change[part])
        first = compared["before"][part]
        least = max(LEAST * abs(first), LEAST_SHARE if part in SHARES else 0.0)
        limit = min(lowest, sign * first - least)
        if highest < 0 and sign * means[part] < limit:  # False where one is NaN
            fallen.add(part)
    return Finding(change["sum"][0] > 0, frozenset(fallen))


def raised(findings: Sequence[Finding], in_a_row: int) -> list[str]:
    """The monitors for which the alarm is raised after the last of the findings, by name."""
    if len(findings) < in_a_row:
        return []
    return sorted(frozenset.intersection(*(one.hacked for one in findings[-in_a_row:])))
