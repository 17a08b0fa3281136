"""An optimizer step's states shared out over groups of ranks, in micro-batches. A pure function.

Ranks wait for the one with the most work, and a minibatch has an equal share of every prompt,
whatever the ranks: by themselves some would have half as many states again as others.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def deal(own: Sequence[Mapping[Hashable, Sequence[T]]], size: int) -> list[list[list[T]]]:
    """Micro-batches of at most `size` by group, each of one shape and of nearly one size.

    No group has more than one more than another, nor more than the fewest that are needed. A group
    keeps what it has, where there is room.

    own: by group, its states by shape
    """
    shapes = list(dict.fromkeys(shape for states in own for shape in states))
    counts = {shape: sum(len(states.get(shape, ())) for states in own) for shape in shapes}
    sizes = _sizes(counts, size, len(own))
    hands: _Hands[T] = _Hands(len(own), sum(map(len, sizes.values())))
    for shape in shapes:
        wanted, left = sizes[shape], list[tuple[int, T]]()
        for group, states in enumerate(own):
            mine = list(states.get(shape, ()))
            while wanted and wanted[0] <= len(mine) and hands.room(group):
                number = wanted.pop(0)
                hands.give(group, mine[:number])
                del mine[:number]
            left += [(group, state) for state in mine]
        for number in wanted:
            owners = [owner for owner, _ in left[:number]]
            most = max(owners, key=owners.count)
            taker = most if hands.room(most) else hands.least()
            hands.give(taker, [state for _, state in left[:number]])
            del left[:number]
    return hands.batches


def _sizes(counts: Mapping[Hashable, int], size: int, groups: int) -> dict[Hashable, list[int]]:
    """The micro-batches' sizes by shape, the largest first.

    As many as every group can have without running more of them than it must: of one size then, so
    that none waits for another's larger one.
    """
    number = {shape: -(-count // size) for shape, count in counts.items()}
    spare = -sum(number.values()) % groups
    for _ in range(spare):
        splittable = [shape for shape in counts if number[shape] < counts[shape]]
        if not splittable:
            break
        number[max(splittable, key=lambda shape: counts[shape] / number[shape])] += 1
    sizes: dict[Hashable, list[int]] = {}
    for shape, count in counts.items():
        if count:
            each, more = divmod(count, number[shape])
            sizes[shape] = [each + 1] * more + [each] * (number[shape] - more)
    return {shape: sizes.get(shape, []) for shape in counts}


class _Hands(Generic[T]):
    """What each group has been given, and who may have one more."""

    def __init__(self, groups: int, total: int) -> None:
        self.batches: list[list[list[T]]] = [[] for _ in range(groups)]
        self.each, self.more = divmod(total, groups)  # so many groups have one more than each

    def room(self, group: int) -> bool:
        """Whether the group may be given another micro-batch."""
        have = len(self.batches[group])
        return have < self.each or (have == self.each and self.more > 0)

    def give(self, group: int, batch: list[T]) -> None:
        """Give a micro-batch to a group that has room."""
        self.more -= len(self.batches[group]) == self.each
        self.batches[group].append(batch)

    def least(self) -> int:
        """The group with the fewest micro-batches."""
        return min(range(len(self.batches)), key=lambda group: len(self.batches[group]))
