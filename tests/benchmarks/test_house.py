"""The counts of benchmarks/house.py on sources of known numbers, and the limits of the tree."""

import pytest

from benchmarks import house
from benchmarks.house import Source, SourceTree, counts, read_tree, table

SOURCE = '''"""Of nothing."""
from fastgrpo.core import files
from fastgrpo.training.update import update
from torch import Tensor

# a size; none = no limit
SIZE = None
"""Clips; None: all."""


class Scorer:
    """Scores.  weights: [C]"""

    def __init__(self, weights: Tensor) -> None:
        self.call(1, 2, *[3], 4, 5)

    @classmethod
    def call(cls, a: int, /, b: int, *args: int, c: int = 0, **more: int) -> Tensor:
        """The scores."""
        return getattr(cls, "x"), getattr(cls, "y", None)  # fmt: skip


def mean(x: "Tensor") -> Tensor:
    """x: [B];  returns a scalar"""
    return x.mean()  # LONG


async def total(*x: Tensor) -> None:
    f(a=1, b=2, c=3, d=4, e=5)
'''.replace("LONG", 90 * "-")

FLOORS = ({"core"}, {"parallel"}, {"training"})


def places(name: str, path: str = "fastgrpo/parallel/scorer.py") -> list[tuple[int, str, int]]:
    count = counts(FLOORS)[name]
    return [(place.line, place.what, place.size) for place in count.places([Source(path, SOURCE)])]


def test_sizes_of_files_functions_and_parameter_lists() -> None:
    lines = {what: size for _, what, size in places("function")}
    assert lines == {"__init__": 2, "call": 3, "mean": 3, "total": 2}
    numbers = {what: size for _, what, size in places("parameters")}
    assert numbers == {"__init__": 1, "call": 5, "mean": 1, "total": 1}
    assert [size for _, _, size in places("file")] == [len(SOURCE.splitlines())]
    assert counts(FLOORS)["function"].of([Source("a.py", SOURCE)]) == 3


def test_call_styles() -> None:
    assert [(what, size) for _, what, size in places("positional")] == [("self.call", 5)]
    assert [what for _, what, _ in places("fmt-skip")] == ["# fmt: skip"]
    assert len(places("getattr")) == 2
    assert [what for _, what, _ in places("getattr-default")] == ["getattr(cls, 'y', None)"]


def test_docstrings() -> None:
    assert [what for _, what, _ in places("shapes")] == ["total", "call"]
    assert [what for _, what, _ in places("of")] == ["Of nothing."]
    assert [what for _, what, _ in places("none")] == ["# a size; none = no limit"]
    assert [size for _, _, size in places("columns")] == [max(map(len, SOURCE.splitlines()))]


@pytest.mark.parametrize(
    ("path", "imports"),
    [
        ("fastgrpo/parallel/scorer.py", ["parallel imports training"]),
        ("fastgrpo/training/scorer.py", []),
        ("fastgrpo/core/scorer.py", ["core imports training"]),
        ("tests/test_scorer.py", []),
    ],
)
def test_imports_that_go_upward(path: str, imports: list[str]) -> None:
    assert [what for _, what, _ in places("upward", path)] == imports


def test_entries_of_a_folder_are_files_and_packages_without_its_face() -> None:
    paths = (
        "a/__init__.py",
        "a/__main__.py",
        "a/one.py",
        "a/b/__init__.py",
        "a/b/two.py",
        "a/b/three.py",
        "rewards/hps.py",
        "rewards/ocr.py",
        "rewards/common/frames.py",
    )
    found = counts(())["entries"].places([Source(path, "") for path in paths])
    assert {place.file: place.what for place in found} == {
        "a": "b, one.py",
        "a/b": "three.py, two.py",
        "rewards": "common, the registry's files",
        "rewards/common": "frames.py",
    }


def test_the_table_has_a_column_for_each_area_and_tree() -> None:
    tree = SourceTree({area: [Source("a/b.py", SOURCE)] for area in house.HEADS}, FLOORS)
    lines = table({"v1": tree, "now": tree}).splitlines()
    assert lines[1].split() == ["v1", "now"] * 3
    numbers = {line.split()[0]: line.split()[-6:] for line in lines[2:]}
    assert set(numbers) == set(counts(()))
    assert numbers["positional"] == ["1"] * 6


LIMITS = {
    "file": 400,
    "function": 60,
    "parameters": 6,
    "entries": 10,
    "upward": 0,
    "shapes": 0,
    "of": 0,
    "none": 0,
}
"""Of the product code: fastgrpo, models, rewards and data."""
FMT_SKIP = 10  # of the whole tree


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return read_tree(house.ROOT)


@pytest.mark.parametrize("name", LIMITS)
def test_the_product_code_keeps_its_limits(tree: SourceTree, name: str) -> None:
    count, limit = counts(tree.floors)[name], LIMITS[name]
    found = count.places(tree.areas["product"])
    above = [place for place in found if not count.largest or place.size > limit]
    assert not above, f"{count.title}: at most {limit}"


def test_the_formatter_is_rarely_switched_off(tree: SourceTree) -> None:
    count = counts(tree.floors)["fmt-skip"]
    total = sum(count.of(sources) for sources in tree.areas.values())
    assert total <= FMT_SKIP, "python -m benchmarks.house --list fmt-skip"
