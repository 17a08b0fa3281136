"""Overrides, `section.key=value`, put into a recipe's tree; and the tree's paths made whole."""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.core.config import fields, paths
from fastgrpo.core.errors import UserError


def apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`.

    `rewards=[{name=..., weights=...}]` sets the whole list.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or (len(keys) < 2 and keys != ["rewards"]):
        raise UserError(
            f"override '{override}': not of the form section.key=value, e.g. run.iterations=20."
        )
    value = with_paths(value_of(keys, text), tuple(keys))
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


def value_of(keys: Sequence[str], text: str) -> Any:
    """A key's value as the command line has it; `none` is None.

    Where the key takes text alone the text is the value, with TOML's quotes or without, so that
    run.dir=2026-11-21 is a folder. Else it is read as TOML, and as text where that fails.
    """
    if text.strip() == "none":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if not isinstance(value, str) and fields.is_text(fields.of_key(keys)):
        return text
    return value


def _item(entries: list[Any], key: str, where: str) -> Any:
    """An entry of a list of tables, by its number."""
    if not key.isdigit() or int(key) >= len(entries):
        raise UserError(
            f"override '{where}': no such entry; there are {len(entries)}, counted from 0."
        )
    return entries[int(key)]


def with_paths(value: Any, keys: tuple[str, ...], base: Path | None = None) -> Any:
    """A value, or a tree of them, with its paths whole, see `paths.py`; `run.dir` stays relative.

    keys: where it is in the recipe
    base: the recipe file's folder, which `./` and `../` begin at; None: the working folder
    Raises UserError for a path that is none.
    """
    if isinstance(value, dict):
        return {key: with_paths(below, (*keys, str(key)), base) for key, below in value.items()}
    if isinstance(value, list):
        return [with_paths(below, (*keys, str(n)), base) for n, below in enumerate(value)]
    if not isinstance(value, str):
        return value
    where, kind = ".".join(keys), fields.path_kind(fields.of_key(keys))
    if keys == ("run", "dir"):
        return paths.expanded(value, where)
    if kind == paths.PATH:
        return paths.whole(value, where, base)
    if kind == paths.PATH_OR_HUB:
        return paths.whole_or_hub(value, where, base)
    own_file = keys[0] == "rewards" and keys[-1] == "name" and paths.is_own_file(value)
    if own_file and value.startswith(("./", "../", "/", "~", "$")):
        return paths.whole(value, where, base)
    if len(keys) == 4 and keys[2] == "options" and _names_a_file(value):
        return paths.whole(value, where, base)
    return value


def _names_a_file(value: str) -> bool:
    """Whether a reward's option is a path, so far as its text tells."""
    if value.startswith(("./", "../", "/", "~", "$")):
        return True
    return ("/" in value or "." in value) and os.path.lexists(value)
