"""How often the network is evaluated in an iteration: the one formula, of a recipe alone.

An evaluation is one sample's state through the network once; classifier-free guidance makes two
forwards of it, and in the update a backward follows. With G samples per prompt, S steps on the grid
(shortened behind a window by `rollout.tail_steps`), the first noisy step f, P prompts and M noises
of each that its samples share:

    rollout, shared noise         P [M (f + 1) + G (S - f - 1)]
    rollout, independent noise    P G S
    scouts, N of C steps          P N C before the rollout
    update                        transitions, those from a shared state counted once per
    optimizer step
    moving average                the update's once more, where the objective looks at it

States before the first noisy step, and the one at it, are equal for samples of one noise, so f + 1
evaluations serve all G / M of them. Where they lie on several ranks, each of them computes what its
own share needs: the sums below run over (group of ranks, noise). The last step's evaluation gives
the clean estimate. With `timestep_choice = "random"` it is chance how many of them chose the shared
step, and with Best-of-N how many are trained: an expectation, and the bounds that always hold. Of
prompts with noisy steps of their own f is a mean.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from fastgrpo.core.config import Recipe
from fastgrpo.core.config.rollout import noisy_count, window_start, window_starts
from fastgrpo.parallel.mesh import contiguous_part
from fastgrpo.training import methods

DRAWS = 200  # iterations over which a mean is taken where prompts draw steps of their own


@dataclass(frozen=True)
class Evaluations:
    """Network calls of one iteration, summed over all groups of ranks."""

    shared: int  # rollout: by states that a group has in common
    single: int  # rollout: by states of one sample each
    scouts: int  # by candidates, before the rollout
    transitions: int  # that the update trains, at most one evaluation each
    update: float  # forwards with a backward, expected
    update_least: int
    update_most: int
    reference: float  # forwards of the initial policy, without a backward, expected
    again: float  # forwards of the old policy or the average, without a backward, expected

    @property
    def rollout(self) -> int:
        return self.shared + self.single


def of_iteration(recipe: Recipe, first: int, groups: int = 1) -> Evaluations:
    """The evaluations of an iteration with every score valid.

    first: the first noisy step, such as `window.noisy_steps(...).start`
    groups: groups of ranks that work on different samples, `World.groups`
    """
    rollout, prompts = recipe.rollout, recipe.prompts.per_iteration
    samples, steps = prompts * rollout.samples_per_prompt, grid_steps(recipe, first)
    visits = sum(1 for _ in _shares(recipe, groups))
    shared, single = 0, samples * steps
    if rollout.shared_noise:
        shared, single = visits * (first + 1), samples * (steps - first - 1)
    update = _update(recipe, groups)
    reference = update[1] if methods.needs_initial_policy(recipe) else 0.0
    again = update[1] * share_again(recipe, groups)
    scouts = prompts * (rollout.scouts or 0) * rollout.scout_steps
    return Evaluations(shared, single, scouts, *update, reference, again)


def share_again(recipe: Recipe, groups: int = 1) -> float:
    """The evaluations before the first optimizer step, as a share of the update's states.

    An expectation. The moving average is evaluated at every state, where the objective looks at it.
    Old log-probabilities of noisy steps are evaluated for micro-batches of optimizer steps after
    the first, in bfloat16, with a state that was not drawn in a batch of their size; of
    samples noised again, whose rollout has none, for all of later steps: see `training.update`.
    """
    average = 1.0 if methods.evaluates_average(recipe.objective) else 0.0
    return average + _share_of_old(recipe, groups)


def _share_of_old(recipe: Recipe, groups: int) -> float:
    """The share of the states that are evaluated for their old log-probability."""
    updates, size = recipe.optimizer.updates_per_iteration, recipe.optimizer.batch_size
    traits, later = methods.traits(recipe), (updates - 1) / updates
    if not traits.noisy_steps:
        return later if traits.has_ratio else 0.0
    if recipe.model.dtype == "float32":
        return 0.0
    if recipe.rollout.at_once != size or size == 1:
        return later * (recipe.rollout.at_once != size)
    samples, prefixes = busiest(recipe, groups)
    batches, each = dealt(recipe, groups)
    states = batches * each  # of a group of ranks in an optimizer step
    shared = 0.0
    if recipe.rollout.shared_noise and _share_of_first(recipe):
        shared = min(1.0, prefixes / states)
    alike = shared * _full(prefixes, size) + (1 - shared) * _full(samples, size)
    full = max(0.0, (each - size + 1) * size / each)  # the share that is in batches of this size
    return later * (1 - full * alike**size)


def dealt(recipe: Recipe, groups: int = 1) -> tuple[int, float]:
    """(micro-batches of a group of ranks in an optimizer step, states in each on average).

    Dealt evenly, see `algorithm.dealing`.
    """
    updates, size = recipe.optimizer.updates_per_iteration, recipe.optimizer.batch_size
    states = _update(recipe, groups)[1] / updates
    batches = max(1, math.ceil(math.ceil(states / size) / groups))
    return batches, max(1.0, states / groups / batches)


def waiting(recipe: Recipe, groups: int = 1) -> float:
    """Share of the update in which groups of ranks wait, since states are dealt whole."""
    batches, size = dealt(recipe, groups)
    states = _update(recipe, groups)[1] / recipe.optimizer.updates_per_iteration / groups
    return 1 - states / (batches * math.ceil(size))


def samples_moved(recipe: Recipe, groups: int) -> float:
    """Samples of the middle group of ranks that others train, expected over an iteration.

    An optimizer step has so many of each prompt by chance (hypergeometric), and a group hands on
    what it has above its mean. The dealing's rounding to whole micro-batches is left out.
    """
    size, updates = recipe.rollout.samples_per_prompt, recipe.optimizer.updates_per_iteration
    drawn = recipe.samples_trained // updates
    share = contiguous_part(recipe.prompts.per_iteration * size, groups, groups // 2)
    own = [here for _, here in _share(share, size)]
    chances = {0: 1.0}
    for here in own:
        of_prompt = {
            n: math.comb(here, n) * math.comb(size - here, drawn - n) / math.comb(size, drawn)
            for n in range(min(here, drawn) + 1)
            if drawn - n <= size - here
        }
        summed: dict[int, float] = {}
        for (a, p), (b, q) in product(chances.items(), of_prompt.items()):
            summed[a + b] = summed.get(a + b, 0.0) + p * q
        chances = summed
    mean = sum(own) * drawn / size
    return updates * sum(p * max(0.0, n - mean) for n, p in chances.items())


def _full(count: int, size: int) -> float:
    """The share of so many that is in full batches."""
    return (count - count % size) / count


def grid_steps(recipe: Recipe, first: int) -> int:
    """S: the steps of the rollout's grid with the window at `first`, see `window.shortened`."""
    rollout = recipe.rollout
    if rollout.window is None or rollout.tail_steps is None:
        return rollout.steps
    end = first + rollout.window
    return end + min(rollout.tail_steps, rollout.steps - end)


def first_steps(recipe: Recipe) -> dict[int, float]:
    """Where the first noisy step lies, with its share of the run's iterations and prompts; an
    expectation for a random window.
    """
    rollout = recipe.rollout
    if rollout.window is None or rollout.window_schedule == "first":
        return {0: 1.0}  # exactly, whatever the iterations add up to
    shares: dict[int, float] = {}
    for iteration in range(recipe.run.iterations):
        start = window_start(rollout, iteration)
        if start is None:
            starts = window_starts(rollout)
            return dict.fromkeys(starts, 1.0 / len(starts))
        shares[start] = shares.get(start, 0.0) + 1.0 / recipe.run.iterations
    return shares


def _shares(recipe: Recipe, groups: int) -> Iterator[tuple[int, int, int]]:
    """(group of ranks, noise, samples from it) where a group has any, dealt as `World.share` deals
    them.
    """
    prompts, total = recipe.prompts.per_iteration, recipe.rollout.samples_per_prompt
    size = total // recipe.rollout.noises_per_prompt
    for group in range(groups):
        for number, here in _share(contiguous_part(prompts * total, groups, group), size):
            yield group, number, here


def _share(share: range, size: int) -> Iterator[tuple[int, int]]:
    """(prompt or noise, samples of it) of one group of ranks.

    share: its samples of all;  size: samples of each prompt, or of each noise
    """
    for number in range(share.start // size, -(-share.stop // size) if share else 0):
        yield number, min(share.stop, (number + 1) * size) - max(share.start, number * size)


def _update(recipe: Recipe, groups: int) -> tuple[int, float, int, int]:
    """(transitions, evaluations expected, at least, at most).

    Per optimizer step and (group of ranks, noise): m samples that choose c of w noisy steps each,
    m c transitions. A sample's choice has the shared step with probability c / w, so that m c / w
    transitions become 1 - (1 - c / w)^m evaluations.
    """
    rollout, kept = recipe.rollout, recipe.samples_trained
    updates, chosen = recipe.optimizer.updates_per_iteration, recipe.steps_trained
    prompts, size = recipe.prompts.per_iteration, rollout.samples_per_prompt
    transitions = prompts * kept * chosen
    if not rollout.shared_noise:
        return transitions, float(transitions), transitions, transitions
    share, noises = _share_of_first(recipe), rollout.noises_per_prompt
    expected = 0.0
    for _, _, here in _shares(recipe, groups):
        for trained, probability in _trained(size, kept, here):
            members = trained / updates
            # so many samples, or one more with this probability
            whole, more = int(members), members % 1
            none = (1 - share) ** whole * (1 - more * share)
            expected += probability * updates * (members * (chosen - share) + 1 - none)
    together = math.ceil(kept / updates / (size // noises))  # noises at least, of a step's samples
    least = prompts * (kept * (chosen - 1) + updates * together) if share else transitions
    most = transitions
    in_each_step = noises == 1 or (kept == size and not size // noises % updates)
    if groups == 1 and share in (0.0, 1.0) and in_each_step:  # nothing is left to chance
        if share:
            least = prompts * (kept * (chosen - 1) + updates * noises)
        most, expected = least, float(least)
    return transitions, expected, least, most


def _trained(size: int, kept: int, here: int) -> Iterator[tuple[int, float]]:
    """How many of `here` samples are among the `kept` of a prompt's `size`, each with its
    probability, as if rewards did not depend on the noise.
    """
    for trained in range(max(0, kept - size + here), min(here, kept) + 1):
        ways = math.comb(here, trained) * math.comb(size - here, kept - trained)
        yield trained, ways / math.comb(size, kept)


def _share_of_first(recipe: Recipe) -> float:
    """Probability that a sample's chosen steps have the first noisy one among them."""
    noisy, chosen = noisy_count(recipe.rollout), recipe.steps_trained
    if recipe.objective.timestep_choice == "first" or chosen == noisy:
        return 1.0
    return 0.0 if recipe.objective.timestep_choice == "last" else chosen / noisy


def busiest(recipe: Recipe, groups: int) -> tuple[int, int]:
    """(samples, noises they start from) of the group of ranks with the most work: the others wait
    for it.
    """
    total, prompts = recipe.rollout.samples_per_prompt, recipe.prompts.per_iteration
    size = total // recipe.rollout.noises_per_prompt
    shares = [contiguous_part(prompts * total, groups, group) for group in range(groups)]
    visits = [-(-share.stop // size) - share.start // size if share else 0 for share in shares]
    return max(zip(map(len, shares), visits, strict=True))


def rollout_work(recipe: Recipe, groups: int) -> tuple[float, float]:
    """(states evaluated, forwards) of the busiest group of ranks in an iteration's rollout.

    The mean over the run's windows. Where each prompt has a noisy step of its own, a group with
    early ones shares less and the others wait for it: the mean over DRAWS iterations of that kind.
    Forwards are those of ranks that keep step with each other. Scouts are counted in model.dtype.
    """
    states, forwards = _samples_work(recipe, groups)
    scouts, steps = busiest_scouts(recipe, groups), recipe.rollout.scout_steps
    return states + scouts * steps, forwards + math.ceil(scouts / recipe.rollout.at_once) * steps


def busiest_scouts(recipe: Recipe, groups: int) -> int:
    """Candidates of the group of ranks with the most of them, in an iteration."""
    return math.ceil(recipe.prompts.per_iteration * (recipe.rollout.scouts or 0) / groups)


def _samples_work(recipe: Recipe, groups: int) -> tuple[float, float]:
    """`rollout_work` of the samples alone."""
    rollout = recipe.rollout
    if rollout.window_schedule == "per_prompt" and rollout.shared_noise:
        draw, pool = random.Random(0), window_starts(rollout)
        found = [
            _drawn_work(recipe, groups, draw.choices(pool, k=recipe.prompts.per_iteration))
            for _ in range(DRAWS)
        ]
        return sum(of[0] for of in found) / DRAWS, sum(of[1] for of in found) / DRAWS
    states = forwards = 0.0
    (samples, prefixes), batch = busiest(recipe, groups), rollout.at_once
    for first, share in first_steps(recipe).items():
        steps = grid_steps(recipe, first)
        shared, single = (first + 1, steps - first - 1) if rollout.shared_noise else (0, steps)
        states += share * (prefixes * shared + samples * single)
        forwards += share * (
            math.ceil(prefixes / batch) * shared + math.ceil(samples / batch) * single
        )
    return states, forwards


def _drawn_work(recipe: Recipe, groups: int, firsts: Sequence[int]) -> tuple[float, float]:
    """`_samples_work` of one iteration.  firsts: by prompt its noisy step"""
    steps, batch = recipe.rollout.steps, recipe.rollout.at_once
    states: dict[int, int] = {}
    for group, number, here in _shares(recipe, groups):
        first = firsts[number // recipe.rollout.noises_per_prompt]
        states[group] = states.get(group, 0) + first + 1 + here * (steps - first - 1)
    samples, prefixes = busiest(recipe, groups)
    forwards = math.ceil(prefixes / batch) * (max(firsts) + 1)
    return max(states.values()), forwards + math.ceil(samples / batch) * (steps - 1 - min(firsts))
