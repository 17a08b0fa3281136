"""A checked recipe from a file and overrides, or one line that says what is wrong."""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fastgrpo.core.config.base import Section
from fastgrpo.core.config.checks import check
from fastgrpo.core.config.reward_spec import RewardSpec
from fastgrpo.core.config.sections import Recipe
from fastgrpo.core.errors import UserError

S = TypeVar("S", bound=Section)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises UserError, in one line, for a missing file, a syntax error, an unknown key, a wrong type
    or values that do not go together.
    """
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    return parse(tree)


def read_tree(path: Path) -> dict[str, Any]:
    """A recipe file as it stands, its paths resolved.

    Raises UserError where it is missing or not TOML.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"recipe={path}: no such file; give the path of a recipe, e.g. launch/t2v_tiny.toml."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"recipe={path}: not a TOML file ({error}); correct it there.") from None
    _resolve_paths(tree, path.resolve().parent)
    return tree


def parse(tree: dict[str, Any]) -> Recipe:
    """A nested dict, as TOML gives it, to a checked recipe."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    check(recipe)
    return recipe


def section(kind: type[S], name: str, values: Mapping[str, Any]) -> S:
    """One section of a recipe, checked on its own.  name: how messages call it"""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{name}.{_one_line(error)}") from None


def _resolve_paths(tree: dict[str, Any], base: Path) -> None:
    """Make `./` and `../` values of the file relative to the file, in place.

    `run.dir` stays as it is.
    """

    def resolved(value: Any, where: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: resolved(below, (*where, key)) for key, below in value.items()}
        if isinstance(value, list):
            return [resolved(below, where) for below in value]
        dotted = (
            isinstance(value, str) and value.startswith(("./", "../")) and where != ("run", "dir")
        )
        return os.path.normpath(base / value) if dotted else value

    tree.update(resolved(tree, ()))


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`.

    The value is read as TOML, as a plain string where that fails, `none` as unset.
    `rewards=[{name=..., weights=...}]` sets the whole list.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or (len(keys) < 2 and keys != ["rewards"]):
        raise UserError(
            f"override '{override}': not of the form section.key=value, e.g. run.iterations=20."
        )
    value = read_value(text)
    if isinstance(value, str) and value.startswith(("./", "../")) and keys != ["run", "dir"]:
        value = os.path.abspath(value)
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _item(node, key, ".".join(keys[: depth + 1]))
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise UserError(
                f"override '{override}': '{'.'.join(keys[: depth + 1])}' has no keys below it; "
                "end the name there."
            )
    if isinstance(node, list):
        raise UserError(
            f"override '{override}': give a key of one entry, e.g. {'.'.join(keys[:-1])}.0.name=..."
        )
    node[keys[-1]] = value


def read_value(text: str) -> Any:
    """A value of the command line: as TOML, as a plain string where that fails; `none` is None."""
    if text.strip() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _item(entries: list[Any], key: str, where: str) -> Any:
    """An entry of a list of tables, by its number."""
    if not key.isdigit() or int(key) >= len(entries):
        raise UserError(
            f"override '{where}': no such entry; there are {len(entries)}, counted from 0."
        )
    return entries[int(key)]


def _one_line(error: ValidationError) -> str:
    """The first problem of a validation error: where, what and the remedy."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(where)
    if problem["type"] == "missing":
        return f"{where}: missing; add it to the recipe or as an override {where}=..."
    more = f" ({error.error_count() - 1} more problems follow.)" if error.error_count() > 1 else ""
    return f"{where}={problem['input']!r}: {problem['msg'].lower()}.{more}"


def _unknown_key(where: str) -> str:
    """The message for a key that no section has, with the nearest that exists."""
    known = all_keys()
    plain = ".".join(part for part in where.split(".") if not part.isdigit())
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
    tail = plain.rsplit(".", 1)[-1]
    same_tail = [key for key in known if key.rsplit(".", 1)[-1] == tail]
    return f"Unknown key '{where}'; did you mean '{(same_tail or near)[0]}'?"


def all_keys() -> list[str]:
    """Every `section.key` of a recipe, and the section names."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = RewardSpec if name == "rewards" else field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        keys += [name, *(f"{name}.{key}" for key in section.model_fields)]
    return keys


def describe() -> str:
    """Every key with its default and meaning, for `fastgrpo keys`."""
    lines = []
    for name, field in Recipe.model_fields.items():
        section = RewardSpec if name == "rewards" else field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        lines.append(f"[[{name}]]" if name == "rewards" else f"[{name}]")
        for key, info in section.model_fields.items():
            default = "required" if info.is_required() else repr(info.default)
            meaning = " ".join((info.description or "").split())
            lines.append(f"  {key:<24} {default:<14} {meaning}".rstrip())
    return "\n".join(lines)
