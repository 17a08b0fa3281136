"""What to give up where no recipe with the same results fits: adapters, frames, size.

In order of what it costs: adapters train another, smaller policy of the same clips; then the least
of the clip's tokens. Each is the mildest that fits, and then tuned.
"""

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgrpo.tools.plan.planner import Plan, plan
from fastgrpo.tools.plan.tuning import choices
from fastgrpo.tools.plan.tuning.choices import Choice
from fastgrpo.tools.plan.tuning.search import Tuned, fits_somehow, tune

LORA_RANKS = (32, 8)
SIZES = 16  # steps from the whole size to a quarter of each side


@dataclass(frozen=True)
class Alternative:
    """A recipe with other results that fits, tuned."""

    given_up: tuple[str, ...]  # overrides that change results
    tuned: Tuned

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.given_up, *self.tuned.overrides)


def alternatives(given: Plan, text: int | None) -> list[Alternative]:
    """The mildest changes with which something fits, those that give up less first.

    given: of which nothing fits as it is;  text: tokens of the longest, as for `plan`
    """
    adapters = next(filter(None, (_fitting(given, [c], text) for c in _adapters(given))), None)
    singles = [
        adapters,
        _fitting(given, shorter(given), text),
        _fitting(given, smaller(given), text),
    ]
    found = [one for one in singles if one is not None]
    if not found:  # adapters and a smaller clip
        added = choices.adapters(given.subject.job.recipe, LORA_RANKS[-1])
        with_adapters = [{**c, **added} for c in smaller(given, frames=1)]
        found = [one for one in (_fitting(given, with_adapters, text),) if one is not None]
    return [one for one in map(_tuned, found) if one is not None]


def with_adapters(given: Plan, rank: int, text: int | None) -> Alternative | None:
    """The same recipe with adapters of a rank, tuned: another algorithm.  None: it does not fit"""
    found = _fitting(given, [choices.adapters(given.subject.job.recipe, rank)], text)
    return None if found is None else _tuned(found)


def _tuned(pair: tuple[Choice, Plan]) -> Alternative | None:
    choice, changed = pair
    tuned = tune(changed)
    given_up = tuple(choices.override(key, to) for key, to in choice.items())
    return None if tuned is None else Alternative(given_up, tuned)


def _fitting(given: Plan, line: Sequence[Choice], text: int | None) -> tuple[Choice, Plan] | None:
    """The first of a line of ever greater sacrifices with which something fits, and its plan."""
    first = bisect(line, 0, key=lambda c: 1 if fits_somehow(_changed(given, c, text)) else -1)
    return None if first == len(line) else (line[first], _changed(given, line[first], text))


def _changed(given: Plan, choice: Choice, text: int | None) -> Plan:
    job = given.subject.job
    return plan(
        choices.changed(job.recipe, choice),
        job.gpus,
        given.machine,
        ranks_per_node=job.ranks_per_node,
        text=text,
    )


def _adapters(given: Plan) -> Iterator[Choice]:
    if not given.subject.job.lora:
        recipe = given.subject.job.recipe
        yield from (choices.adapters(recipe, rank) for rank in LORA_RANKS)


def shorter(given: Plan) -> list[Choice]:
    """Clips of ever fewer frames, as the VAE takes them."""
    frames, time = given.subject.job.recipe.video.frames, given.subject.auxiliary.time
    return [{"video.frames": fewer} for fewer in range(frames - time, 0, -time)]


def smaller(given: Plan, **more: int) -> list[Choice]:
    """Ever smaller pictures of nearly the same shape, as VAE and network take them."""
    video, found = given.subject.job.recipe.video, list[Choice]()
    multiple = given.subject.multiple
    for step in range(1, SIZES):
        share = 1 - 0.75 * step / (SIZES - 1)
        height, width = (
            max(1, round(side * share / multiple)) * multiple
            for side in (video.height, video.width)
        )
        choice: dict[str, Any] = {"video.height": height, "video.width": width}
        if choice not in found and (height, width) != (video.height, video.width):
            found.append(choice)
    return [{**choice, **{f"video.{key}": to for key, to in more.items()}} for choice in found]
