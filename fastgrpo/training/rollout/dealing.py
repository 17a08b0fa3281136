"""An iteration's samples dealt to groups of ranks, and to batches of equal conditions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastgrpo.core.policy import Condition, shape_key
from fastgrpo.parallel.world import World
from fastgrpo.training.rollout.plan import Plan

Round = tuple[list[int], bool]  # a batch of slots or prefixes, and whether its result counts


def batches(
    slots: Sequence[int],
    conditions: Sequence[Condition],
    group_size: int,
    size: int,
) -> Iterator[list[int]]:
    """Slots in batches of at most `size` with conditions of equal shapes, so without padding.

    conditions: one per prompt of the iteration
    """
    by_shape: dict[object, list[int]] = {}
    for slot in slots:
        by_shape.setdefault(shape_key(conditions[slot // group_size]), []).append(slot)
    for members in by_shape.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """The distribution of an iteration's samples over groups of ranks and batches."""

    conditions: Sequence[Condition]  # one per prompt of the iteration
    plan: Plan
    batch_size: int  # samples per forward
    world: World

    @property
    def total(self) -> int:
        """Samples of all ranks."""
        return len(self.conditions) * self.plan.group_size

    def rounds(self) -> Iterator[Round]:
        """The batches of this rank's group, each with whether its result counts."""
        return self._in_step(self.samples_of)

    def prefix_rounds(self) -> Iterator[Round]:
        """The batches of this rank's group's prefixes for `shared_prefixes`, like `rounds`."""
        return self._in_step(self.prefixes_of)

    def batch_sizes(self) -> dict[int, tuple[int, int]]:
        """How many rows the network saw at once, by slot, of all ranks.

        returns (rows beside the samples' shared state, rows beside the sample's own states)
        """
        sizes: dict[int, tuple[int, int]] = {}
        for group in range(self.world.groups):
            of_prefix: dict[int, int] = {}
            for batch in self.prefixes_of(group):
                firsts = [self._first_of(prefix) for prefix in batch]
                for prefix, first in zip(batch, firsts, strict=True):
                    of_prefix[prefix] = sum(other >= first for other in firsts)
            for batch in self.samples_of(group):
                for slot in batch:
                    sizes[slot] = of_prefix[slot // self.plan.sharing], len(batch)
        return sizes

    def metrics(self) -> dict[str, float]:
        """The noisy steps, and the rows that the network evaluates to draw noisy trajectories.

        An iteration's, of all groups of ranks; repeated batches are not counted.
        """
        plan, rows = self.plan, 0
        for group in range(self.world.groups):
            slots = [slot for batch in self.samples_of(group) for slot in batch]
            if plan.shared_noise:
                prefixes = [prefix for batch in self.prefixes_of(group) for prefix in batch]
                rows += sum(self._first_of(prefix) + 1 for prefix in prefixes)
                slots_first = [plan.first_of(slot // plan.group_size) for slot in slots]
                rows += sum(plan.steps - 1 - first for first in slots_first)
            else:
                rows += len(slots) * plan.steps
        steps = [plan.noisy_of(prompt).start for prompt in range(len(self.conditions))]
        return {
            "rollout/evaluations": float(rows),
            "rollout/noisy_step": sum(steps) / len(steps),
            "rollout/noisy_step_min": float(min(steps)),
            "rollout/noisy_step_max": float(max(steps)),
        }

    def _first_of(self, prefix: int) -> int:
        return self.plan.first_of(prefix // self.plan.prefixes_per_prompt)

    def samples_of(self, group: int) -> list[list[int]]:
        """A group of ranks' samples in batches."""
        share = self.world.share(self.total, group)
        return list(batches(share, self.conditions, self.plan.group_size, self.batch_size))

    def prefixes_of(self, group: int) -> list[list[int]]:
        """A group of ranks' prefixes in batches; groups whose samples share one have it each."""
        share = self.world.share(self.total, group)
        end = -(-share.stop // self.plan.sharing) if share else 0
        prefixes, each = range(share.start // self.plan.sharing, end), self.plan.prefixes_per_prompt
        return list(batches(prefixes, self.conditions, each, self.batch_size))

    def _in_step(self, of_group: Callable[[int], list[list[int]]]) -> Iterator[Round]:
        """The group's batches; in lockstep its last one again, until all groups ran as many."""
        own = of_group(self.world.group)
        yield from ((batch, True) for batch in own)
        if self.plan.lockstep:
            most = max(len(of_group(group)) for group in range(self.world.groups))
            filler = own[-1] if own else [0]
            yield from ((filler, False) for _ in range(most - len(own)))
