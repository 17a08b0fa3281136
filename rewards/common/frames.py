"""Which frames of a clip an image reward looks at.

Nothing here imports torch: the planner counts frames with this file.
"""

from collections.abc import Callable

from fastgrpo.core.config import RewardSpec

Rule = str | int
"""As `RewardSpec.frames`: "all", "first", "middle", or a number of evenly spaced frames."""


def choose(rule: Rule, frames: int) -> list[int]:
    """Indices of the chosen ones among `frames` frames, in order, each once.

    A number n takes the middles of n equal shares of the clip, floor((2 i + 1) frames / 2 n), so
    that the first frame, which is the easiest to please with, has no special place; where the clip
    is shorter, all of its frames.
    """
    if rule == "all":
        return list(range(frames))
    if rule == "first":
        return [0]
    if rule == "middle":
        return [frames // 2]
    wanted = min(int(rule), frames)
    return [(2 * i + 1) * frames // (2 * wanted) for i in range(wanted)]


def rule_of(spec: RewardSpec, default: Rule) -> Rule:
    """The rule that a recipe sets, else the reward's own."""
    return default if spec.frames is None else spec.frames


def count_by(default: Rule) -> Callable[[RewardSpec, int, float], int]:
    """A `RewardSize.frames_scored` for a reward that chooses its frames by a rule.

    default: the reward's own rule, where a recipe sets none
    """

    def frames_scored(spec: RewardSpec, frames: int, fps: float) -> int:
        return len(choose(rule_of(spec, default), frames))

    return frames_scored
