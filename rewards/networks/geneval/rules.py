"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513) on objects that a detector found.

`correct` is the benchmark's verdict on a picture, `graded` and `exact` are the two further numbers
that reinforcement learning took of it (flow_grpo). Two departures of `graded` from that code: each
term lies within 0 and 1 (three objects too many of one gave -2), and a position that is not judged
because its target failed gives 0, not 0 and 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastgrpo.rewards.networks.geneval.names import CLASSES, COLOURS, RELATIONS

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # that a score must exceed
MOST = 16  # objects of a class, the best
NEAR = 0.1  # of the sum of two sizes, within which centres are not apart
CLEAR = 0.5  # of the offset's length, that a direction must exceed

Box = tuple[float, float, float, float]
"""(left, top, right, bottom), pixels, y downward; right and bottom are one past the last pixel."""


@dataclass(frozen=True, eq=False)
class Found:
    """An object that the detector found."""

    name: str
    score: float
    box: Box
    mask: Tensor  # bool [H, W]


@dataclass(frozen=True)
class Wanted:
    """An entry of a prompt's specification."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None  # a relation, and to which earlier entry


@dataclass(frozen=True)
class Specification:
    """What a picture of a prompt must show, and must not."""

    counting: bool  # the benchmark's tag, which raises the threshold
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


ColourOf = Callable[[Found], str]
Groups = Mapping[str, Sequence[Found]]


def specification(row: Mapping[str, object]) -> Specification:
    """The specification of a line of evaluation_metadata.jsonl.

    Raises ValueError, which says what is wrong with the line.
    """
    include, exclude = row.get("include"), row.get("exclude") or []
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        raise ValueError("has no list 'include' of objects, or an 'exclude' that is no list")
    wanted = tuple(_wanted(entry, place) for place, entry in enumerate(include))
    unwanted = tuple(_wanted(entry, 0) for entry in exclude)
    return Specification(row.get("tag") == "counting", wanted, unwanted)


def _wanted(entry: object, place: int) -> Wanted:
    """An entry. Raises ValueError.  place: its number, of which a position names an earlier one"""
    if not isinstance(entry, Mapping):
        raise ValueError(f"has an object {entry!r}, no mapping")
    name, count, colour = entry.get("class"), entry.get("count"), entry.get("color")
    if name not in CLASSES:
        raise ValueError(f"asks for {name!r}, which the detector does not know")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"asks for {count!r} of {name}")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"asks for the colour {colour!r}, not one of {', '.join(COLOURS)}")
    position = entry.get("position")
    if position is None:
        return Wanted(name, count, colour)
    fits = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
    if not fits or not isinstance(position[1], int) or not 0 <= position[1] < place:
        raise ValueError(f"has the position {position!r}, no relation to an earlier object")
    return Wanted(name, count, colour, (position[0], position[1]))


def grouped(found: Sequence[Found], counting: bool) -> dict[str, list[Found]]:
    """The objects that count, by class, the best first."""
    least = COUNTING_THRESHOLD if counting else THRESHOLD
    groups: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > least:
            groups.setdefault(one.name, []).append(one)
    return {name: several[:MOST] for name, several in groups.items()}


def relations(a: Box, b: Box) -> set[str]:
    """What box a is of box b: some of RELATIONS, two of them on a diagonal, no one nearby.

    With c the centres and d the sizes: o = c_a - c_b, shortened towards 0 by 0.1 (d_a + d_b), and
    its direction is that of the shortened over the length of the whole.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [max(abs(o) - NEAR * size, 0.0) for o, size in zip(offset, sizes, strict=True)]
    if all(part < 1e-3 for part in left):
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = (part / length * (1 if o > 0 else -1) for part, o in zip(left, offset, strict=True))
    found = ((dx < -CLEAR), (dx > CLEAR), (dy < -CLEAR), (dy > CLEAR))
    return {name for name, holds in zip(RELATIONS, found, strict=True) if holds}


def correct(asked: Specification, groups: Groups, colour_of: ColourOf) -> bool:
    """The benchmark's verdict: the n best of each class are there, and as they should be.

    More than n are wrong only where `exclude` says so.
    """
    taken: list[Sequence[Found] | None] = []
    for want in asked.include:
        best = groups.get(want.name, ())[: want.count]
        good = len(best) == want.count and _coloured(want, best, colour_of) == want.count
        taken.append(best if good and _placed(want, best, taken) else None)
    spare = any(len(groups.get(no.name, ())) >= no.count for no in asked.exclude)
    return None not in taken and not spare


def graded(asked: Specification, groups: Groups, colour_of: ColourOf) -> float:
    """How much of the specification a picture shows, 0 to 1: the mean of its terms, see `_terms`."""
    terms = [term for entry in _terms(asked, groups, colour_of) for term in entry]
    return sum(terms) / len(terms)


def exact(asked: Specification, groups: Groups, colour_of: ColourOf) -> bool:
    """Whether everything is as asked, with no object of a class too many: stricter than `correct`."""
    return all(term == 1.0 for entry in _terms(asked, groups, colour_of) for term in entry)


def _terms(asked: Specification, groups: Groups, colour_of: ColourOf) -> list[list[float]]:
    """For each entry its terms within 0 and 1.

    With c wanted and f found: 1 - |c - f| / c; where the entry has a colour or a position, 0 too
    where f is not c; else 1 - |c - r| / c of the r of the right colour, and, where all have it, 1
    or 0 for the position.
    """
    found, exactly = list[list[float]](), list[Sequence[Found] | None]()
    for want in asked.include:
        several = groups.get(want.name, ())
        terms = [_near(want.count, len(several))]
        further = want.colour is not None or want.position is not None
        if further and len(several) != want.count:
            terms.append(0.0)
        elif further:
            right = _coloured(want, several, colour_of)
            terms += [_near(want.count, right)] * (want.colour is not None)
            if want.position is not None and right == want.count:
                terms.append(float(_placed(want, several, exactly)))
            elif want.position is not None:
                terms.append(0.0)
        exactly.append(several if all(term == 1.0 for term in terms) else None)
        found.append(terms)
    return found


def _near(wanted: int, found: int) -> float:
    return max(1 - abs(wanted - found) / wanted, 0.0)


def _coloured(want: Wanted, several: Sequence[Found], colour_of: ColourOf) -> int:
    """How many have the wanted colour; all of them where none is wanted."""
    if want.colour is None:
        return len(several)
    return sum(colour_of(one) == want.colour for one in several)


def _placed(
    want: Wanted, several: Sequence[Found], earlier: Sequence[Sequence[Found] | None]
) -> bool:
    """Whether each has the wanted relation to each object of the target, which did not fail."""
    if want.position is None:
        return True
    relation, index = want.position
    target = earlier[index]
    return target is not None and all(
        relation in relations(one.box, other.box) for one in several for other in target
    )
