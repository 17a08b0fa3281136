"""What is wrong with a recipe's keys, in the words of the recipe: a line for each key."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fastgrpo.core.config import fields
from fastgrpo.core.config.base import Section
from fastgrpo.core.config.reward_spec import RewardSpec
from fastgrpo.core.config.sections import Recipe

NEAR = 0.75  # likeness from which a key is taken for what was meant
ELSEWHERE = {
    "eval_steps": "evaluations on the way come after each evaluate.every iterations",
    "scheduler": "the rate follows optimizer.schedule, optimizer.warmup_updates and optimizer.decay_updates",
    "lr_scheduler": "the rate follows optimizer.schedule, optimizer.warmup_updates and optimizer.decay_updates",
    "epochs": "the length of a run is run.iterations",
    "learning_rate": "the rate is optimizer.lr",
    "output_dir": "the folder of a run is run.dir",
    "batch_size_per_gpu": "samples at once are rollout.batch_size and optimizer.batch_size",
}
"""Other trainers' names of keys, and what does that here."""


def lines(error: ValidationError, section: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Key -> its line, in the order of the recipe.  section: where the checked tree lies in it

    A key that may be of several types has one line.
    """
    found: dict[tuple[str, ...], str] = {}
    for problem in error.errors():
        keys = _written((*section, *map(str, problem["loc"])))
        where = ".".join(keys)
        if problem["type"] == "extra_forbidden":
            found.setdefault(keys, unknown_key(where))
        elif problem["type"] == "value_error":  # a section's own words
            found.setdefault(keys, f"{where}: {problem['ctx']['error']}.")
        elif problem["type"] == "missing":
            found.setdefault(
                keys, f"{where}: missing; add it to the recipe or as an override {where}=..."
            )
        else:
            found.setdefault(keys, _wrong_value(keys, problem["input"]))
    # an array whose entry has a mistake is too short without it: that says nothing new
    above = {keys[:n] for keys in found for n in range(len(keys))}
    return {keys: line for keys, line in found.items() if keys not in above}


def _written(location: Sequence[str]) -> tuple[str, ...]:
    """The key as a recipe has it: pydantic's location goes on into the alternatives of a type."""
    count = len(location)
    while count > 1 and fields.of_key(location[:count]) is None:
        count -= 1
    inside = fields.of_key(location[:count])
    whole = inside is None or fields.is_section(inside)  # a key that the section does not have
    return tuple(location if whole else location[:count])


def _wrong_value(keys: tuple[str, ...], value: Any) -> str:
    """The line for a key with a value that it cannot have."""
    annotation = fields.of_key(keys)
    near = ""
    if isinstance(value, str):
        closest = difflib.get_close_matches(value, fields.words(annotation), n=1)
        near = f"; did you mean {closest[0]}?" if closest else ""
    if isinstance(value, str) and fields.is_array_of_text(annotation):
        near = f"; write it as {_toml([value])}."
    return f"{'.'.join(keys)}={_toml(value)}: must be {fields.allowed(annotation)}{near or '.'}"


def _toml(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, list):
        return (
            f"[{', '.join(json.dumps(entry, ensure_ascii=False, default=str) for entry in value)}]"
        )
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(entry)}' for key, entry in value.items())} }}"
    return str(value)


def unknown_key(where: str) -> str:
    """The message for a key that no section has, with the nearest that exists."""
    known = all_keys()
    plain = ".".join(part for part in where.split(".") if not part.isdigit())
    section, _, tail = plain.rpartition(".")
    if elsewhere := ELSEWHERE.get(plain, ELSEWHERE.get(tail)):
        return f"Unknown key '{where}'; {elsewhere}."
    same_tail = [key for key in known if key.rpartition(".")[2] == tail]
    beside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    near = [
        f"{section}.{key}".lstrip(".")
        for key in difflib.get_close_matches(tail, beside, n=1, cutoff=NEAR)
    ]
    near = near or same_tail or difflib.get_close_matches(plain, known, n=1, cutoff=NEAR)
    if near:
        return f"Unknown key '{where}'; did you mean '{near[0]}'?"
    has = ", ".join(beside)
    what = f"[{section}] has" if section else "the sections are"
    return f"Unknown key '{where}'; {what} {has}."


def all_keys() -> list[str]:
    """Every `section.key` of a recipe, and the section names."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = RewardSpec if name == "rewards" else field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        keys += [name, *(f"{name}.{key}" for key in section.model_fields)]
    return keys
