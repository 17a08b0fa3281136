"""An iteration's transitions as optimizer steps, dealt to the groups of ranks in micro-batches.

The unit of work is a state: a sample at a chosen step, a whole group where its samples are still
equal, or the two samples of a pair, which the network sees as two rows. Pure functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastgrpo.algorithm import selection
from fastgrpo.algorithm.dealing import deal
from fastgrpo.core.config import Optimizer
from fastgrpo.core.policy import shape_key
from fastgrpo.parallel.world import World
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import Plan

State = tuple[int, tuple[int, ...]]
"""A step, and the slots whose sample is in this state before it, or the two slots of a pair."""
MicroBatch = list[State]
"""States for one forward, all of one expert. One whose only state has no slots is empty: it keeps
step with other ranks, and its step says by which expert."""
Unit = tuple[int, ...]  # slots that no optimizer step parts: a sample's, or a pair's


@dataclass(frozen=True)
class OptimizerStep:
    """The work of one optimizer step."""

    transitions: int  # of all ranks
    batches: list[list[MicroBatch]]  # by group of ranks, as many for each, in the experts' order

    def states(self) -> Iterator[tuple[int, State]]:
        """Every state, with the group of ranks that evaluates it."""
        for group, batches in enumerate(self.batches):
            yield from ((group, state) for batch in batches for state in batch if state[1])


def optimizer_steps(
    experience: Experience, settings: Optimizer, skipped: Sequence[bool], world: World
) -> list[OptimizerStep]:
    """The work of all ranks, without optimizer steps that have no transitions.

    skipped: [N], whether a sample is counted without being evaluated
    """
    plan = experience.plan
    key = ("minibatches", plan.seed, plan.iteration)
    units = {unit[0]: unit for unit in _units(experience)}
    firsts = experience.selected.clone().fill_(False)
    firsts[list(units)] = True
    steps = []
    for members in selection.minibatches(
        firsts, plan.group_size, settings.updates_per_iteration, key
    ):
        transitions = sum(len(plan.chosen(slot)) * len(units[slot]) for slot in members)
        if transitions:
            active = [units[slot] for slot in members if not skipped[slot]]
            size = max(1, settings.batch_size // (2 if experience.paired else 1))
            steps.append(OptimizerStep(transitions, _dealt(active, experience, size, world)))
    return steps


def rows(state: State, paired: bool) -> list[tuple[int, int]]:
    """The slot and step of each row that the network sees of a state."""
    step, slots = state
    return [(slot, step) for slot in (slots if paired else slots[:1])]


def by_group(steps: Sequence[OptimizerStep]) -> list[list[MicroBatch]]:
    """The micro-batches of several optimizer steps by group of ranks."""
    all_steps = zip(*(step.batches for step in steps), strict=True)
    return [[batch for batches in of_group for batch in batches] for of_group in all_steps]


def is_empty(batch: MicroBatch) -> bool:
    """Whether a micro-batch only keeps step with other ranks."""
    return not batch[0][1]


def in_step(batches: Sequence[list[MicroBatch]], group: int, plan: Plan) -> Sequence[MicroBatch]:
    """A group's micro-batches with the empty ones of `aligned`."""
    return aligned(batches, plan)[group] if batches else ()


def aligned(batches: Sequence[list[MicroBatch]], plan: Plan) -> list[list[MicroBatch]]:
    """The groups' micro-batches in the experts' order, with empty ones to as many of each.

    So all ranks are at the same expert at any time: its weights lie on all of them.
    """
    steps: dict[int, int] = {}  # by expert, a step of its
    for own in batches:
        steps |= {plan.expert(batch[0][0]): batch[0][0] for batch in own}
    found: list[list[MicroBatch]] = [[] for _ in batches]
    for expert in sorted(steps):
        parts = [[b for b in own if plan.expert(b[0][0]) == expert] for own in batches]
        most = max(map(len, parts))
        for own, part in zip(found, parts, strict=True):
            own += part + [[(steps[expert], ())] for _ in range(most - len(part))]
    return found


def ends_an_expert(batches: Sequence[MicroBatch], number: int, plan: Plan) -> bool:
    """Whether no later micro-batch has the expert of this one.  number: of this one, from 0"""
    following = batches[number + 1 : number + 2]
    own = plan.expert(batches[number][0][0])
    return not following or plan.expert(following[0][0][0]) != own


def states_of(units: Sequence[Unit], plan: Plan) -> list[State]:
    """The distinct states before the units' chosen steps; a pair's are those of its first slot."""
    slots_of: dict[tuple[int, int, int | None], list[int]] = {}
    for unit in units:
        first = unit[0]
        for step in plan.chosen(first):
            own = None if plan.is_shared(first, step) else first
            slots_of.setdefault((step, first // plan.sharing, own), []).extend(unit)
    return [(step, tuple(members)) for (step, _, _), members in slots_of.items()]


def _units(experience: Experience) -> list[Unit]:
    """The selected samples, each alone or in pairs, the better one first."""
    selected = experience.selected
    if experience.paired:
        group_size = experience.plan.group_size
        return [*selection.pairs(experience.advantages, selected, group_size)]
    return [(slot,) for slot, taken in enumerate(selected.tolist()) if taken]


def _dealt(
    units: Sequence[Unit], experience: Experience, size: int, world: World
) -> list[list[MicroBatch]]:
    """All ranks' states, dealt to the groups of ranks in batches of one expert and text length.

    size: states in a batch
    """
    plan, conditions = experience.plan, experience.conditions
    total = len(conditions) * plan.group_size
    # by expert, by group, by shape
    own: dict[int, list[dict[object, list[State]]]] = {}
    for group in range(world.groups):
        share = world.share(total, group)
        for state in states_of([unit for unit in units if unit[0] in share], plan):
            step, slots = state
            of_expert = own.setdefault(plan.expert(step), [{} for _ in range(world.groups)])
            shape = shape_key(conditions[slots[0] // plan.group_size])
            of_expert[group].setdefault(shape, []).append(state)
    dealt: list[list[MicroBatch]] = [[] for _ in range(world.groups)]
    for expert in sorted(own):
        for batches, more in zip(dealt, deal(own[expert], size), strict=True):
            batches += more
    idle: MicroBatch = [(0, ())]  # nothing is evaluated: every sample has advantage 0
    return aligned(dealt, plan) if own else [[idle] for _ in dealt]
