"""A folder as a registry: adding a file adds its entry, and what a file declares is read without
importing all of it.

A family of models or a reward imports torch and its libraries, which takes seconds; a plan, `check`
and every `--help` want some constants or one function of it. `declared` runs only the top-level
statements that those need.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastgrpo.core.errors import UserError, described

NOTHING = object()


def names(folder: Path, entry: str) -> tuple[str, ...]:
    """The files of a folder that define `entry` at their top level, by name, sorted.

    A file that is not Python is left out: it is told where it is asked for, see `check`.
    """

    def defines(file: Path) -> bool:
        try:
            return entry in _definitions(file)
        except (SyntaxError, UnicodeDecodeError):
            return False

    return tuple(file.stem for file in sorted(folder.glob("[!_]*.py")) if defines(file))


def check(where: str, file: Path, entry: str) -> None:
    """Raise UserError where a file is not Python or has no function `entry` at its top level."""
    try:
        defined = _definitions(file)
    except SyntaxError as error:
        raise UserError(f"{where}: {described(error)}; correct it there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where}: {file} cannot be read ({error}); give a file of Python."
        ) from None
    if entry not in defined:
        raise UserError(f"{where}: {file} has no function {entry}; add it at its top level.")


def nearest(name: str, known: Sequence[str]) -> str:
    """A question after the name that was meant, such as " Did you mean flux?"; empty: none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def file_of_module(name: str) -> Path | None:
    """The file of an installed module, found without importing anything. None: it is not there."""
    top, *below = name.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not below:
        return None if found is None or found.origin is None else Path(found.origin)
    for folder in found.submodule_search_locations or ():
        start = Path(folder, *below[:-1])
        for file in (start / f"{below[-1]}.py", start / below[-1] / "__init__.py"):
            if file.is_file():
                return file
    return None


def top_level(file: Path) -> tuple[str, ...]:
    """The names that a file binds at its top level, those that it imports among them."""
    return tuple(_definitions(file))


def declared(file: Path, name: str, default: Any = NOTHING) -> Any:
    """The value of a file's top-level `name`, without importing the file.

    Only the statements are run that define the name and what that uses, imports among them. So a
    function that needs no torch comes without torch. Raises KeyError where the file has no such
    name and there is no default.
    """
    if name not in _definitions(file):
        if default is NOTHING:
            raise KeyError(f"{file}: no {name} at its top level")
        return default
    return _run(file, name, file.stat().st_mtime_ns)


@cache
def _run(file: Path, name: str, changed: int) -> Any:
    """changed: the file's time, so that an edited file is read anew"""
    definitions, wanted, waiting = _definitions(file), set[int](), [name]
    tree = _tree(file, changed)
    while waiting:
        for number in definitions.get(waiting.pop(), ()):
            if number not in wanted:
                wanted.add(number)
                waiting += [
                    node.id for node in ast.walk(tree.body[number]) if isinstance(node, ast.Name)
                ]
    tree = ast.Module(
        [statement for number, statement in enumerate(tree.body) if number in wanted], []
    )
    space: dict[str, Any] = {"__name__": f"{__name__}:{file.stem}", "__file__": str(file)}
    # our own file, of which an import would run more
    exec(compile(tree, str(file), "exec", dont_inherit=True), space)
    return space[name]


def _definitions(file: Path) -> dict[str, list[int]]:
    """Name -> the numbers of the top-level statements that bind it."""
    return _definitions_at(file, file.stat().st_mtime_ns)


@cache
def _definitions_at(file: Path, changed: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, statement in enumerate(_tree(file, changed).body):
        for name in _bound(statement):
            found.setdefault(name, []).append(number)
    return found


@cache
def _tree(file: Path, changed: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement binds."""
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            yield statement.name
        case ast.Import() | ast.ImportFrom():
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (
                node.id
                for target in targets
                for node in ast.walk(target)
                if isinstance(node, ast.Name)
            )
