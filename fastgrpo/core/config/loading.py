"""A checked recipe from a file and overrides, or one line that says what is wrong."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fastgrpo.core.config import checks, fields, messages
from fastgrpo.core.config.base import Section
from fastgrpo.core.config.overrides import apply, with_paths
from fastgrpo.core.config.reward_spec import RewardSpec
from fastgrpo.core.config.sections import Recipe
from fastgrpo.core.errors import UserError

S = TypeVar("S", bound=Section)
PATHS = """Paths: in a recipe's file ./ and ../ begin at the file. Other relative paths, those of
overrides and run.dir begin at the working folder. ~ and $NAME are as in a shell, and builtin:NAME
is what comes with the package."""


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises UserError, in one line, for a missing file, a syntax error, an unknown key, a wrong type
    or values that do not go together.
    """
    tree = read_tree(path)
    for override in overrides:
        apply(tree, override)
    return parse(tree)


def load_with_mistakes(path: Path, overrides: Sequence[str]) -> tuple[Recipe | None, list[str]]:
    """The recipe as far as it can be read, and a line for each mistake in it.

    A key with a mistake is left at its default, so that the others are still checked. None: a key
    without a default has one. Raises UserError for a file that is not TOML.
    """
    tree, mistakes = read_tree(path), list[str]()
    for override in overrides:
        try:
            apply(tree, override)
        except UserError as error:
            mistakes.append(str(error))
    told = set[tuple[str, ...]]()
    for _ in range(2):  # the second time without the keys that have mistakes
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            found = messages.lines(error)
            new = [line for keys, line in found.items() if keys not in told]
            mistakes += [line for line in new if line not in mistakes]
            told |= found.keys()
            _leave_out(tree, found)
        else:
            return recipe, [*mistakes, *checks.mistakes(recipe)]
    return None, mistakes


def _leave_out(tree: dict[str, Any], keys: Iterable[tuple[str, ...]]) -> None:
    """Remove keys from a tree, where they are in it."""
    for *above, last in keys:
        node: Any = tree
        for key in above:
            if isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            else:
                node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)


def read_tree(path: Path) -> dict[str, Any]:
    """A recipe file as it stands, its paths whole.

    Raises UserError where it is missing or not TOML.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"recipe={path}: no such file; give the path of a recipe, e.g. launch/t2v_tiny.toml."
        ) from None
    except OSError as error:
        raise UserError(
            f"recipe={path}: cannot be read ({error.strerror}); give the path of a recipe, e.g. "
            "launch/t2v_tiny.toml."
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"recipe={path}: not a TOML file ({error}); correct it there.") from None
    found: dict[str, Any] = with_paths(tree, (), path.resolve().parent)
    return found


def parse(tree: dict[str, Any]) -> Recipe:
    """A nested dict, as TOML gives it, to a checked recipe."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    checks.check(recipe)
    return recipe


def section(kind: type[S], name: str, values: Mapping[str, Any]) -> S:
    """One section of a recipe, checked on its own.  name: how messages call it"""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_one_line(error, (name,))) from None


def _one_line(error: ValidationError, section: tuple[str, ...] = ()) -> str:
    """The first problem of a validation error, and how many others there are."""
    first, *others = messages.lines(error, section).values()
    if not others:
        return first
    problems = "another mistake" if len(others) == 1 else f"{len(others)} other mistakes"
    return f"{first} And {problems}: `fastgrpo check` lists all."


def describe(only: str | None = None) -> str:
    """Every key with its default and meaning, for `fastgrpo keys`.

    only: a section, whose keys are listed with their possible values, too. None: all sections
    Raises UserError where there is no such section.
    """
    if only is not None and only not in Recipe.model_fields:
        raise UserError(
            f"SECTION={only}: no such section; use one of {', '.join(Recipe.model_fields)}."
        )
    lines = [PATHS]
    for name, field in Recipe.model_fields.items():
        if only not in (None, name):
            continue
        section = RewardSpec if name == "rewards" else field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines.append(f"[[{name}]]" if name == "rewards" else f"[{name}]")
        for key, info in section.model_fields.items():
            default = "required" if info.is_required() else repr(info.default)
            meaning = " ".join((info.description or "").split())
            lines.append(f"  {key:<24} {default:<14} {meaning}".rstrip())
            if only is not None:
                place = (name, "0", key) if name == "rewards" else (name, key)
                lines.append(f"  {'':<24} {'':<14} Values: {fields.allowed(fields.of_key(place))}.")
    return "\n".join(lines)
