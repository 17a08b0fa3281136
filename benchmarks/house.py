"""Counts that describe the source tree: sizes, call styles, docstrings and layers.

    python -m benchmarks.house [--rev GIT_REV] [--list NAME]

prints a table for the working tree, beside a git revision where `--rev` names one. `--list` prints
every place of one count, of that revision where there is one. tests/benchmarks/test_house.py has
the limits.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import tarfile
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("fastgrpo", "models", "rewards", "data")
AREAS = {folder: "product" for folder in PRODUCT} | {"benchmarks": "benchmarks", "tests": "tests"}
HEADS = ("product", "benchmarks", "tests")
FLOORS_FILE = "tests/repository/test_repository.py"
"""The file whose literal FLOORS lists the packages of fastgrpo by floor, the lowest first."""
NOT_CHOSEN = ("__init__.py", "__main__.py")
REGISTRIES, ENTRIES = ("models", "rewards"), "the registry's files"
COLUMNS, POSITIONS = 100, 4
SHAPE = re.compile(r"\[[^\]]*\]|\bscalars?\b")
NONE = re.compile(r"\bnone =|[;,] none\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Floors = Sequence[Collection[str]]
N = TypeVar("N", bound=ast.AST)


@dataclass(frozen=True)
class Place:
    """One place in the tree that a count is made of."""

    file: str
    line: int
    what: str
    size: int = 1


class Source:
    """A Python file: its path relative to the root, its lines and its syntax tree."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.tree = ast.parse(text)

    def at(self, node: ast.stmt | ast.expr, what: str, size: int = 1) -> Place:
        """The place of a node."""
        return Place(self.path, node.lineno, what, size)

    def functions(self) -> Iterator[tuple[Function, ast.ClassDef | None]]:
        """Every function and method, also nested ones, with the class whose body has it."""
        for parent in ast.walk(self.tree):
            owner = parent if isinstance(parent, ast.ClassDef) else None
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield node, owner

    def nodes(self, kind: type[N]) -> Iterator[N]:
        """Every node of one kind."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kind))

    def docstrings(self) -> Iterator[tuple[int, str]]:
        """Line and text of every string that is a statement: docstrings, also those of fields."""
        for node in self.nodes(ast.Expr):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield node.lineno, node.value.value

    def comments(self) -> Iterator[tuple[int, str]]:
        """Line and text of every comment."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


@dataclass(frozen=True)
class SourceTree:
    """The Python files of a working tree or revision by area, and the floors of its packages."""

    areas: dict[str, list[Source]]
    floors: Floors


def read_tree(root: Path) -> SourceTree:
    """The files below `root`; links are not followed. Without a FLOORS_FILE there are no floors."""
    areas: dict[str, list[Source]] = {area: [] for area in AREAS.values()}
    for name, area in AREAS.items():
        for folder, folders, names in os.walk(root / name):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            files = [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
            texts = [(file.relative_to(root).as_posix(), file.read_text("utf-8")) for file in files]
            areas[area] += [Source(path, text) for path, text in texts]
    where = next((source for source in areas["tests"] if source.path == FLOORS_FILE), None)
    for node in where.nodes(ast.Assign) if where else ():
        if ast.unparse(node.targets[0]) == "FLOORS":
            return SourceTree(areas, ast.literal_eval(node.value))
    return SourceTree(areas, ())


def entries(sources: Sequence[Source]) -> Iterator[Place]:
    """Folders, each with the number of files and packages in it that a reader chooses among.

    The files of a registry are one: a recipe names them, and a table of the docs lists them.
    """
    chosen: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        parts = source.path.split("/")
        for depth in range(1, len(parts)):
            folder, file = "/".join(parts[:depth]), depth == len(parts) - 1
            if parts[depth] not in NOT_CHOSEN:
                chosen[folder].add(ENTRIES if file and folder in REGISTRIES else parts[depth])
    for folder, names in chosen.items():
        yield Place(folder, 0, ", ".join(sorted(names)), len(names))


def file_lines(source: Source) -> Iterator[Place]:
    """The file with its lines."""
    yield Place(source.path, 1, "", len(source.text.splitlines()))


def function_lines(source: Source) -> Iterator[Place]:
    """Functions and methods, each with its lines from `def` on, the docstring counted."""
    for function, _ in source.functions():
        length = (function.end_lineno or 0) - function.lineno + 1
        yield source.at(function, function.name, length)


def parameters(source: Source) -> Iterator[Place]:
    """Functions, each with its parameters: without self and cls, *args and **kwargs one each."""
    for function, _ in source.functions():
        names = [argument.arg for argument in _arguments(function)]
        yield source.at(function, function.name, len(names) - (names[:1] in (["self"], ["cls"])))


def _arguments(function: Function) -> list[ast.arg]:
    every = function.args
    starred = [argument for argument in (every.vararg, every.kwarg) if argument is not None]
    return [*every.posonlyargs, *every.args, *every.kwonlyargs, *starred]


def positional(source: Source) -> Iterator[Place]:
    """Calls with more than four positional arguments, an unpacked *args counted as one."""
    for call in source.nodes(ast.Call):
        if len(call.args) > POSITIONS:
            yield source.at(call, ast.unparse(call.func), len(call.args))


def fmt_skip(source: Source) -> Iterator[Place]:
    """Comments that switch the formatter off."""
    for line, comment in source.comments():
        if "fmt: skip" in comment:
            yield Place(source.path, line, comment)


def getattr_calls(source: Source, least: int = 2) -> Iterator[Place]:
    """Calls of getattr with so many arguments or more."""
    for call in source.nodes(ast.Call):
        if ast.unparse(call.func) == "getattr" and len(call.args) >= least:
            yield source.at(call, ast.unparse(call))


def shapeless(source: Source) -> Iterator[Place]:
    """Functions with a Tensor in an annotation whose docstring shows no shape.

    A shape of __init__ may stand in the docstring of its class.
    """
    for function, owner in source.functions():
        annotations = [
            *(argument.annotation for argument in _arguments(function)),
            function.returns,
        ]
        if not any("Tensor" in ast.unparse(annotation) for annotation in annotations if annotation):
            continue
        described = [function, owner] if owner and function.name == "__init__" else [function]
        if not SHAPE.search(" ".join(ast.get_docstring(node) or "" for node in described)):
            yield source.at(function, function.name)


def long_lines(source: Source) -> Iterator[Place]:
    """Lines of more than 100 columns."""
    for line, text in enumerate(source.text.splitlines(), 1):
        if len(text) > COLUMNS:
            yield Place(source.path, line, text.strip(), len(text))


def begins_with_of(source: Source) -> Iterator[Place]:
    """Docstrings whose first line begins with "Of "."""
    for line, text in source.docstrings():
        if text.lstrip().startswith("Of "):
            yield Place(source.path, line, text.strip().splitlines()[0])


def none_word(source: Source) -> Iterator[Place]:
    """Lines of docstrings and comments that seem to write None as "none"."""
    for first, text in (*source.docstrings(), *source.comments()):
        for line, part in enumerate(text.splitlines(), first):
            if NONE.search(part):
                yield Place(source.path, line, part.strip())


def upward(source: Source, floors: Floors) -> Iterator[Place]:
    """Imports that leave a package of fastgrpo and do not go down to a lower floor."""
    floor_of = {package: floor for floor, packages in enumerate(floors) for package in packages}
    here = source.path.removeprefix("fastgrpo/").split("/")[0].removesuffix(".py")
    imports: list[ast.Import | ast.ImportFrom] = [*source.nodes(ast.Import)]
    for node in (*imports, *source.nodes(ast.ImportFrom)):
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        modules = [f"{prefix}{alias.name}".split(".") for alias in node.names]
        for there in {parts[1] for parts in modules if parts[0] == "fastgrpo" and len(parts) > 1}:
            if there != here and floor_of.get(there, -1) >= floor_of.get(here, len(floors)):
                yield source.at(node, f"{here} imports {there}")


@dataclass(frozen=True)
class Count:
    """One line of the table: the number of places, or the largest of their sizes."""

    title: str
    in_file: Callable[[Source], Iterator[Place]] | None  # None: entries, of all files
    largest: bool = False

    def places(self, sources: Sequence[Source]) -> list[Place]:
        """The places in these files."""
        found = map(self.in_file, sources) if self.in_file else [entries(sources)]
        return list(chain.from_iterable(found))

    def of(self, sources: Sequence[Source]) -> int:
        """The number for these files."""
        sizes = [place.size for place in self.places(sources)]
        return max(sizes, default=0) if self.largest else len(sizes)


def counts(floors: Floors) -> dict[str, Count]:
    """Every count by the name that `--list` takes."""
    return {
        "entries": Count("entries of the largest folder", None, largest=True),
        "file": Count("lines of the longest file", file_lines, largest=True),
        "function": Count("lines of the longest function", function_lines, largest=True),
        "parameters": Count("most parameters of a function", parameters, largest=True),
        "positional": Count("calls with more than 4 positional arguments", positional),
        "fmt-skip": Count("`fmt: skip` comments", fmt_skip),
        "getattr": Count("getattr calls", getattr_calls),
        "getattr-default": Count("getattr with a default", partial(getattr_calls, least=3)),
        "shapes": Count("tensor functions without a shape in the docstring", shapeless),
        "columns": Count("lines above 100 columns", long_lines),
        "of": Count('docstrings that begin with "Of "', begins_with_of),
        "none": Count("lines that write None as none", none_word),
        "upward": Count("imports that go upward", partial(upward, floors=floors)),
    }


def table(trees: Mapping[str, SourceTree]) -> str:
    """A line for each count, a column for each area and tree.  trees: heading -> tree"""
    heads = [[area for area in HEADS for _ in trees], list(trees) * len(HEADS)]
    lines = [f"{'':66}" + "".join(f"{head[:11]:>12}" for head in row) for row in heads]
    for name, count in counts(()).items():
        columns = ((tree, area) for area in HEADS for tree in trees.values())
        numbers = (counts(tree.floors)[name].of(tree.areas[area]) for tree, area in columns)
        lines.append(f"{name:<16}{count.title:<50}" + "".join(f"{n:>12}" for n in numbers))
    return "\n".join(lines)


def at_revision(revision: str) -> SourceTree:
    """The tree of a git revision, read through a temporary folder."""
    content = subprocess.check_output(["git", "archive", revision], cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(folder, filter="data")
        return read_tree(Path(folder))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.house")
    parser.add_argument("--rev", metavar="GIT_REV", help="a revision beside the working tree")
    parser.add_argument("--list", choices=tuple(counts(())), help="print the places of one count")
    options = parser.parse_args(argv)
    before = {} if options.rev is None else {options.rev: at_revision(options.rev)}
    if options.list is None:
        return print(table(before | {"now": read_tree(ROOT)}))
    tree = before.get(options.rev) or read_tree(ROOT)
    count = counts(tree.floors)[options.list]
    places = chain.from_iterable(count.places(sources) for sources in tree.areas.values())
    for place in sorted(places, key=lambda place: (-place.size, place.file, place.line)):
        print(f"{place.file}:{place.line}  {place.size}  {place.what}".rstrip())


if __name__ == "__main__":
    main()
