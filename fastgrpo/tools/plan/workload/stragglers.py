"""How unequal an optimizer step's samples lie on the ranks: all wait for the one that has the most.

A minibatch has an equal share of every prompt, whatever the ranks, while a prompt's samples may lie
on several groups of ranks and Best-of-N keeps those that it keeps. So with few samples per group
some have more of a minibatch.
"""

import random
from bisect import bisect
from functools import cache

from fastgrpo.core.config import Recipe
from fastgrpo.parallel.mesh import contiguous_part

DRAWS = 4  # of which samples are kept, and of how they are dealt


@cache
def widest(prompts: int, size: int, kept: int, updates: int, groups: int) -> float:
    """Samples of the group of ranks with the most of a minibatch, summed over an iteration's
    minibatches, the mean.

    size: samples per prompt, of which `kept` are trained;  the dealing is that of
    `selection.minibatches`
    """
    chance, total = random.Random(0), prompts * size
    starts = [contiguous_part(total, groups, group).start for group in range(groups)]
    most = 0
    for _ in range(DRAWS):
        counts = [[0] * groups for _ in range(updates)]
        for prompt in range(prompts):
            members = sorted(chance.sample(range(prompt * size, (prompt + 1) * size), kept))
            for block in range(0, kept, updates):
                dealt = members[block : block + updates]
                chance.shuffle(dealt)
                for place, member in enumerate(dealt):
                    counts[(place + prompt) % updates][bisect(starts, member) - 1] += 1
        most += sum(max(of_groups) for of_groups in counts)
    return most / DRAWS


def idle(recipe: Recipe, groups: int) -> float:
    """The share of the update in which a group of ranks waits for the others, on average."""
    prompts, size, kept = (
        recipe.prompts.per_iteration,
        recipe.rollout.samples_per_prompt,
        recipe.samples_trained,
    )
    return 1 - prompts * kept / groups / widest(
        prompts, size=size, kept=kept, updates=recipe.optimizer.updates_per_iteration, groups=groups
    )
