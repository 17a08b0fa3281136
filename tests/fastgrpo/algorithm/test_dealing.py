"""States are dealt evenly, each once, and no group has more micro-batches than it must."""

import random
from collections.abc import Hashable
from itertools import chain

import pytest

from fastgrpo.algorithm.dealing import deal


def hands(own: list[dict[Hashable, list[str]]], size: int) -> list[list[list[str]]]:
    return deal(own, size)


@pytest.mark.parametrize("seed", range(40))
def test_evenly_and_each_once(seed: int) -> None:
    chance = random.Random(seed)
    size, groups = chance.randint(1, 9), chance.randint(1, 8)
    own: list[dict[Hashable, list[str]]] = [
        {
            shape: [f"{shape}{group}-{n}" for n in range(chance.choice((0, 1, 3, 14, 30)))]
            for shape in "ab"
        }
        for group in range(groups)
    ]
    dealt = hands(own, size)
    everything = list(chain(*chain(*dealt)))
    assert sorted(everything) == sorted(chain(*chain(*(states.values() for states in own))))
    counts = [len(batches) for batches in dealt]
    assert max(counts) - min(counts) <= 1
    fewest = sum(-(-sum(len(s.get(shape, ())) for s in own) // size) for shape in "ab")
    assert max(counts) == -(-fewest // groups)
    for shape in "ab":  # of one size
        sizes = [len(batch) for batch in chain(*dealt) if batch[0][0] == shape]
        assert not sizes or max(sizes) - min(sizes) <= 1
    for batch in chain(*dealt):
        assert 1 <= len(batch) <= size and len({state[0] for state in batch}) == 1


def test_what_is_even_stays_where_it_is() -> None:
    own: list[dict[Hashable, list[str]]] = [
        {"a": [f"{group}-{n}" for n in range(6)]} for group in range(3)
    ]
    assert hands(own, 2) == [
        [[f"{group}-{n}", f"{group}-{n + 1}"] for n in (0, 2, 4)] for group in range(3)
    ]


def test_none_waits_for_a_fuller_batch() -> None:
    """84 states on two groups in batches of 80: 42 each and not 80 beside 4; on four, 21 each."""
    for groups, each in ((2, 42), (4, 21)):
        own: list[dict[Hashable, list[str]]] = [
            {"a": [f"{group}-{n}" for n in range(84 // groups)]} for group in range(groups)
        ]
        assert [[len(batch) for batch in batches] for batches in hands(own, 80)] == [
            [each]
        ] * groups


def test_only_a_surplus_moves() -> None:
    """12 and 6 of 18 states, one at a time: three go from the first group to the second."""
    own: list[dict[Hashable, list[str]]] = [
        {"a": [f"0-{n}" for n in range(12)]},
        {"a": [f"1-{n}" for n in range(6)]},
    ]
    first, second = hands(own, 1)
    assert [state for (state,) in first] == [f"0-{n}" for n in range(9)]
    assert [state for (state,) in second] == [
        *(f"1-{n}" for n in range(6)),
        *(f"0-{n}" for n in (9, 10, 11)),
    ]
