"""The quickest plan that fits, among recipes with the same results.

Branch and bound. A frame, the keys that all phases feel, has a bound: its seconds with whatever
takes the most memory and the least time. Frames are searched from the least bound on, until the
next bound is no better than the best plan found. Inside a frame the phases are apart: the rollout's
keys and the update's are each searched for the quickest that fits. So the answer is exact for the
values of `choices`, and the same each time.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from fastgrpo.core.errors import UserError
from fastgrpo.tools.plan import phases
from fastgrpo.tools.plan.costs import host
from fastgrpo.tools.plan.phases import Phase
from fastgrpo.tools.plan.planner import Plan
from fastgrpo.tools.plan.subject import Subject, with_recipe
from fastgrpo.tools.plan.tuning import choices
from fastgrpo.tools.plan.tuning.choices import Choice
from fastgrpo.tools.plan.workload import network_calls
from fastgrpo.training import methods

MARGIN = 0.05  # share of the usable memory that a tuned plan leaves free
WORTH = 0.01  # share of the seconds below which a key is left as it is


@dataclass(frozen=True)
class Win:
    """What one override of a tuned plan wins, by leaving it out."""

    override: str
    seconds: float  # per iteration
    memory: float  # bytes at the peak
    needed: bool  # the plan would not fit, or leave less than the margin


@dataclass(frozen=True)
class Tuned:
    """The quickest plan that fits with the margin, and what it changes."""

    plan: Plan
    wins: tuple[Win, ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(win.override for win in self.wins)


def tune(given: Plan) -> Tuned | None:
    """The quickest neighbour of a plan with the same results.  None: nothing fits with the margin

    given: whatever its memory
    """
    search = _Search(given)
    best = search.quickest()
    if best is None:
        return None
    choice = _without_idle_keys(given, best)
    return Tuned(_planned(given, choice), tuple(_wins(given, choice)))


def roomy(found: Plan) -> bool:
    """Whether a plan leaves the margin."""
    return found.fits_host and all(map(partial(_fits, found), found.phases))


def fits_somehow(given: Plan) -> bool:
    """Whether the most frugal values fit with the margin, whatever their time.

    A node's memory, where it is known, may be too small for what is frugal on the GPU.
    """
    known = given.machine.ram_gib is not None
    there = choices.value(given.subject.job.recipe, "distributed.offload")
    most = "nvme" if there == "nvme" else True
    places = [(most, "host"), (most, "device"), (False, "host"), (False, "device")]
    if there == "nvme":  # and nothing else, see `choices.frames`
        places = places[:2]
    ways = product(choices.sequence_ranks(given.subject), places if known else places[:1])
    for sp, (offload, store) in ways:
        frugal = {
            **choices.FRUGAL,
            "distributed.sp": sp,
            "distributed.shard": "all",
            "distributed.offload": offload,
            "rollout.store": store,
        }
        tried = _tried(given, frugal)
        if tried is not None and roomy(tried):
            return True
    return False


def _fits(given: Plan, phase: Phase) -> bool:
    return phase.peak <= (1 - MARGIN) * given.machine.usable()


def _planned(given: Plan, choice: Choice) -> Plan:
    """The plan with these values.  Raises UserError where a run would refuse them."""
    recipe = choices.changed(given.subject.job.recipe, choice)
    methods.check(recipe)
    found = with_recipe(given.subject, recipe)
    return replace(given, subject=found, phases=phases.iteration_phases(found, given.machine))


@dataclass
class _Search:
    """The search around one plan."""

    given: Plan

    def quickest(self) -> Choice | None:
        """Values of the quickest plan.  None: nothing fits"""
        if not fits_somehow(self.given):
            return None
        best: tuple[float, Choice] | None = None
        for bound, choice in sorted(self._bounds(), key=lambda pair: pair[0]):
            if best is not None and bound >= best[0]:
                break
            found = self._inside(choice)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return best and best[1]

    def _bounds(self) -> Iterator[tuple[float, Choice]]:
        """Frames that a run would accept, with seconds that none of their plans goes below."""
        known: dict[str, float] = {}
        for frame in choices.frames(self.given.subject):
            for together in self._batches(frame).together:
                choice = {**frame, **together}
                quickest = {**choice, **choices.QUICKEST}
                key = str(quickest)
                if key not in known:
                    known[key] = self._least(quickest)
                if known[key] < math.inf:
                    yield known[key], choice

    def _least(self, frame: Choice) -> float:
        """Seconds of a frame's quickest phases, whatever their memory; inf: a run refuses it."""
        batches, machine = self._batches(frame), self.given.machine
        try:
            others = phases.other_phases(self._subject(frame), machine)
        except UserError:
            return math.inf
        drawing = min(
            _seconds(phases.drawing_phases(self._subject({**frame, **size}), machine))
            for size in batches.drawn
        )
        update = min(
            phases.update_phase(self._subject({**frame, **size}), machine).seconds
            for size in batches.trained
        )
        return phases.iteration_seconds(others, self.given.every) + drawing + update

    def _batches(self, frame: Choice) -> choices.Batches:
        job = self.given.subject.job
        groups = job.gpus // frame["distributed.sp"]
        return choices.batches(job.recipe, max(1, network_calls.busiest(job.recipe, groups)[0]))

    def _subject(self, choice: Choice) -> Subject:
        return with_recipe(
            self.given.subject, choices.changed(self.given.subject.job.recipe, choice)
        )

    def _inside(self, frame: Choice) -> tuple[float, Choice] | None:
        """Seconds and values of a frame's quickest plan that fits."""
        machine, subject = self.given.machine, self._subject(frame)
        others = phases.other_phases(subject, machine)
        if not all(map(partial(_fits, self.given), others)):
            return None
        drawing = self._drawing(frame)
        update = drawing and self._update(frame)
        if not drawing or not update:
            return None
        found = [*others, *drawing[0], update[0]]
        choice = {**frame, **drawing[1], **update[1]}
        if not machine.has_ram(sum(host.of_node(self._subject(choice).job).values())):
            return None
        return phases.iteration_seconds(found, self.given.every), choice

    def _drawing(self, frame: Choice) -> tuple[tuple[Phase, ...], Choice] | None:
        """Rollout and decoding, as quick as they fit."""
        fitting = []
        for size, weights in product(
            self._batches(frame).drawn, choices.drawing(self.given.subject.job.recipe)
        ):
            choice = {**size, **weights}
            found = phases.drawing_phases(self._subject({**frame, **choice}), self.given.machine)
            if all(map(partial(_fits, self.given), found)):
                fitting.append((found, choice))
        return min(fitting, key=lambda pair: _seconds(pair[0]), default=None)

    def _update(self, frame: Choice) -> tuple[Phase, Choice] | None:
        """The update, as quick as it fits: in each list the first that fits, by bisection."""
        fitting = []
        for size, line in product(self._batches(frame).trained, choices.recomputing()):
            low, high = 0, len(line) - 1
            found = self._updated({**frame, **size}, line[high])
            if not _fits(self.given, found):
                continue
            while low < high:
                middle = (low + high) // 2
                tried = self._updated({**frame, **size}, line[middle])
                if _fits(self.given, tried):
                    found, high = tried, middle
                else:
                    low = middle + 1
            fitting.append((found, {**size, **line[high]}))
        return min(fitting, key=lambda pair: pair[0].seconds, default=None)

    def _updated(self, frame: Choice, choice: Choice) -> Phase:
        return phases.update_phase(self._subject({**frame, **choice}), self.given.machine)


def _seconds(several: Iterable[Phase]) -> float:
    return sum(phase.seconds for phase in several)


def _without_idle_keys(given: Plan, choice: Choice) -> Choice:
    """The values that differ from the recipe's, but for those that win next to nothing.

    Left out one by one, the least first, as long as the plan fits and is as quick.
    """
    recipe = given.subject.job.recipe
    kept = {key: to for key, to in choice.items() if choices.value(recipe, key) != to}
    allowed = (1 + WORTH) * _planned(given, kept).seconds
    while True:
        without = [
            (tried.seconds, key)
            for key in kept
            if (tried := _tried(given, _less(kept, key))) is not None
            and roomy(tried)
            and tried.seconds <= allowed
        ]
        if not without:
            return kept
        kept = _less(kept, min(without)[1])


def _less(choice: Choice, key: str) -> dict[str, object]:
    return {other: to for other, to in choice.items() if other != key}


def _tried(given: Plan, choice: Choice) -> Plan | None:
    try:
        return _planned(given, choice)
    except UserError:
        return None


def _wins(given: Plan, choice: Choice) -> Iterator[Win]:
    """What each value wins, the most seconds first."""
    whole = _planned(given, choice)
    found = []
    for key, to in choice.items():
        without = _tried(given, _less(choice, key))
        override = choices.override(key, to)
        if without is None:
            found.append(Win(override, 0.0, 0.0, True))
            continue
        seconds, memory = without.seconds - whole.seconds, without.worst.peak - whole.worst.peak
        found.append(Win(override, seconds, memory, not roomy(without)))
    yield from sorted(found, key=lambda win: (-win.seconds, win.override))
