"""What the sections say of a recipe's key: its type, and its possible values in words."""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from fastgrpo.core.config.paths import PATH, PATH_OR_HUB
from fastgrpo.core.config.sections import Recipe

LIMITS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
WORDS = {
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "text",
    "object": "a table of keys",
}


def of_key(keys: Sequence[str]) -> Any:
    """The annotation of a key, such as ("rewards", "0", "path"); None where no section has it."""
    found: Any = Recipe
    for key in keys:
        entry = _entry(found)
        if entry is not None and key.isdigit():
            found = entry
            continue
        table = found if entry is None else entry  # a reward's key may come without its number
        if is_section(table) and key in table.model_fields:
            found = _annotation(table.model_fields[key])
        elif get_origin(found) is dict:
            found = get_args(found)[1]
        else:
            return None
    return found


def _annotation(field: FieldInfo) -> Any:
    """A field's annotation with its limits, which pydantic keeps apart."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _entry(annotation: Any) -> Any:
    """The type of an array's entries; None where the annotation is no array of any length."""
    plain = _plain(annotation)
    arguments = get_args(plain)
    return arguments[0] if get_origin(plain) is tuple and arguments[-1] is Ellipsis else None


def _plain(annotation: Any) -> Any:
    """The annotation without what is noted beside it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union; empty for another annotation."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def is_section(annotation: Any) -> bool:
    """Whether a key is a table of the recipe's own keys."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def path_kind(annotation: Any) -> str | None:
    """PATH or PATH_OR_HUB of a key that is one; None: another kind of key."""
    if get_origin(annotation) is Annotated:
        marks = [mark for mark in get_args(annotation)[1:] if mark in (PATH, PATH_OR_HUB)]
        return marks[0] if marks else path_kind(_plain(annotation))
    kinds = (path_kind(part) for part in _alternatives(annotation))
    return next((kind for kind in kinds if kind is not None), None)


def is_text(annotation: Any) -> bool:
    """Whether every value of a key, but None, is text."""
    plain = _plain(annotation)
    if alternatives := _alternatives(plain):
        return all(part is type(None) or is_text(part) for part in alternatives)
    if get_origin(plain) is Literal:
        return all(isinstance(value, str) for value in get_args(plain))
    return plain in (str, Path)


def is_array_of_text(annotation: Any) -> bool:
    """Whether a key is an array of texts."""
    return _entry(annotation) is str


def words(annotation: Any) -> list[str]:
    """The words that a key may have as its value."""
    plain = _plain(annotation)
    if get_origin(plain) is Literal:
        return [str(value) for value in get_args(plain)]
    return [word for part in _alternatives(plain) for word in words(part)]


def allowed(annotation: Any) -> str:
    """What a key may have as its value, in words, such as "a whole number above 0, or auto"."""
    if _entry(annotation) is not None and is_section(_entry(annotation)):
        return "an array of tables, at least one, each under its own [[rewards]]"
    return "text" if annotation is None else _in_words(TypeAdapter(annotation).json_schema())


def _in_words(schema: Mapping[str, Any]) -> str:
    """The values of a JSON schema."""
    if "anyOf" in schema:
        parts = [_in_words(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return ", or ".join(sorted(parts, key=lambda part: not part.startswith(("a ", "true"))))
    if "const" in schema or "enum" in schema:
        *rest, last = map(str, schema.get("enum", [schema.get("const")]))
        return f"{', '.join(rest)} or {last}" if rest else last
    kind = schema.get("type")
    if kind == "array":
        several = 'texts, such as ["a", "b"]'
        if "prefixItems" in schema:
            several = f"{len(schema['prefixItems'])} numbers, such as [0.9, 0.999]"
        return f"an array of {several}"
    if kind == "object" and schema.get("additionalProperties", {}).get("type") == "number":
        return "a table of numbers, such as { a = 1.0 }"
    limits = [f"{text} {schema[name]:g}" for name, text in LIMITS.items() if name in schema]
    return " ".join([WORDS.get(str(kind), "text"), " and ".join(limits)]).strip()
