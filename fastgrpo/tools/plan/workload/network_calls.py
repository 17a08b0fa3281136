"""How often the network is evaluated in an iteration: the one formula, of a recipe alone.

An evaluation is one sample's state through the network once; classifier-free guidance makes two
forwards of it, and in the update a backward follows. With G samples per prompt, S steps on the grid
(shortened behind a window by `rollout.tail_steps`), the first noisy step f, and P prompts:

    rollout, shared noise         P [(f + 1) + G (S - f - 1)]
    rollout, independent noise    P G S
    update                        transitions, those from a group's shared state counted once per
    optimizer step DiffusionNFT, c chosen times  P G (S + c) in the rollout, the old policy's
    velocities included; P G c in the update

States before the first noisy step, and the one at it, are equal for a group, so f + 1 evaluations
serve all G samples. Where a group's samples lie on several ranks, each of them computes what its
own share needs: the sums below run over (group of ranks, prompt). The last step's evaluation gives
the clean estimate. With `timestep_choice = "random"` it is chance how many of a group's samples
chose the shared step: an expectation, and the bounds that always hold.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from fastgrpo.core.config import Recipe
from fastgrpo.core.config.window import noisy_count, window_start, window_starts
from fastgrpo.parallel.mesh import contiguous_part
from fastgrpo.training import methods


@dataclass(frozen=True)
class Evaluations:
    """Network calls of one iteration, summed over all groups of ranks."""

    shared: int  # rollout: by states that a group has in common
    single: int  # rollout: by states of one sample each
    transitions: int  # that the update trains, at most one evaluation each
    update: float  # forwards with a backward, expected
    update_least: int
    update_most: int
    reference: float  # forwards of the initial policy, without a backward, expected
    again: float  # forwards for old log-probabilities, without a backward, expected

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
    visits = sum(1 for _ in _shares(prompts, rollout.samples_per_prompt, groups))
    shared, single = 0, samples * steps
    if rollout.shared_noise:
        shared, single = visits * (first + 1), samples * (steps - first - 1)
    if methods.traits(recipe).old_velocities:
        single += samples * recipe.steps_trained
    update = _update(recipe, groups)
    reference = update[1] if methods.needs_initial_policy(recipe) else 0.0
    again = update[1] * share_again(recipe, groups)
    return Evaluations(shared, single, *update, reference, again)


def share_again(recipe: Recipe, groups: int = 1) -> float:
    """The share of the update's states that are evaluated before it for their old log-probability.

    An expectation. They are micro-batches of optimizer steps after the first, in bfloat16, with a
    state that was not drawn in a batch of their size: see `training.update`.
    """
    updates, size = recipe.optimizer.updates_per_iteration, recipe.optimizer.batch_size
    if recipe.model.dtype == "float32" or not methods.traits(recipe).noisy_steps:
        return 0.0
    later = (updates - 1) / updates
    if recipe.rollout.at_once != size or size == 1:
        return later * (recipe.rollout.at_once != size)
    samples, prompts = busiest(recipe, groups)
    batches, each = dealt(recipe, groups)
    states = batches * each  # of a group of ranks in an optimizer step
    shared = 0.0
    if recipe.rollout.shared_noise and _share_of_first(recipe):
        shared = min(1.0, prompts / states)
    alike = shared * _full(prompts, size) + (1 - shared) * _full(samples, size)
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
    """Where the first noisy step lies, with its share of the run's iterations; an expectation for a
    random window.
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


def _shares(prompts: int, size: int, groups: int) -> Iterator[tuple[int, int]]:
    """(prompt, samples of it) for each group of ranks that has any, dealt as `World.share` deals
    them.
    """
    for group in range(groups):
        yield from _share(contiguous_part(prompts * size, groups, group), size)


def _share(share: range, size: int) -> Iterator[tuple[int, int]]:
    """(prompt, samples of it) of one group of ranks.  share: its samples of all"""
    for prompt in range(share.start // size, -(-share.stop // size) if share else 0):
        yield prompt, min(share.stop, (prompt + 1) * size) - max(share.start, prompt * size)


def _update(recipe: Recipe, groups: int) -> tuple[int, float, int, int]:
    """(transitions, evaluations expected, at least, at most).

    Per optimizer step and (group of ranks, prompt): m samples that choose c of w noisy steps each,
    m c transitions. A sample's choice has the shared step with probability c / w, so that m c / w
    transitions become 1 - (1 - c / w)^m evaluations.
    """
    size, kept = recipe.rollout.samples_per_prompt, recipe.samples_trained
    updates, chosen = recipe.optimizer.updates_per_iteration, recipe.steps_trained
    transitions = recipe.prompts.per_iteration * kept * chosen
    if not recipe.rollout.shared_noise:
        return transitions, float(transitions), transitions, transitions
    share = _share_of_first(recipe)
    expected = 0.0
    for _, here in _shares(recipe.prompts.per_iteration, size, groups):
        members = here * kept / size / updates
        # so many samples, or one more with this probability
        whole, more = (
            int(members),
            members % 1,
        )
        none = (1 - share) ** whole * (1 - more * share)
        expected += updates * (members * (chosen - share) + 1 - none)
    least = recipe.prompts.per_iteration * (kept * (chosen - 1) + updates) if share else transitions
    most = transitions
    if groups == 1 and share in (0.0, 1.0):  # nothing is left to chance
        most, expected = least, float(least)
    return transitions, expected, least, most


def _share_of_first(recipe: Recipe) -> float:
    """Probability that a sample's chosen steps have the first noisy one among them."""
    noisy, chosen = noisy_count(recipe.rollout), recipe.steps_trained
    if recipe.objective.timestep_choice == "first" or chosen == noisy:
        return 1.0
    return 0.0 if recipe.objective.timestep_choice == "last" else chosen / noisy


def busiest(recipe: Recipe, groups: int) -> tuple[int, int]:
    """(samples, prompts they belong to) of the group of ranks with the most work: the others wait
    for it.
    """
    size, prompts = recipe.rollout.samples_per_prompt, recipe.prompts.per_iteration
    shares = [contiguous_part(prompts * size, groups, group) for group in range(groups)]
    visits = [-(-share.stop // size) - share.start // size if share else 0 for share in shares]
    return max(zip(map(len, shares), visits, strict=True))
