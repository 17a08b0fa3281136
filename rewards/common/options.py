"""Options, device and precision, which every reward reads from its spec in the same way."""

import difflib
from typing import TypeVar

import torch
from pydantic import ValidationError

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.errors import UserError

Options = TypeVar("Options", bound=Section)


def parse(spec: RewardSpec, schema: type[Options]) -> Options:
    """`rewards.options` as the reward's own model.

    Raises UserError, in one line, for an unknown key or a bad value.
    """
    unknown = [key for key in spec.options if key not in schema.model_fields]
    if unknown:
        raise UserError(
            f"rewards.options.{unknown[0]}: "
            f"{_no_such(spec.name, unknown[0], list(schema.model_fields))}"
        )
    try:
        return schema.model_validate(spec.options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(key) for key in problem["loc"])
        said = problem["msg"].removeprefix("Value error, ")
        raise UserError(
            f"rewards.options.{key}={problem['input']!r}: {said}; see "
            "docs/guides/rewards/rewards.md."
        ) from None


def refuse(spec: RewardSpec) -> None:
    """Raise UserError where a reward that takes no options is given some."""
    parse(spec, Section)


def _no_such(name: str, key: str, fields: list[str]) -> str:
    if not fields:
        return f"{name} takes no options; leave it out."
    near = difflib.get_close_matches(key, fields, n=1)
    return f"{name} has no such option; " + (
        f"did you mean '{near[0]}'?" if near else f"it has {', '.join(fields)}."
    )


def device(spec: RewardSpec) -> torch.device:
    """The device of the weights.

    Raises UserError for a name that is no device, or a GPU that is not there.
    """
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(spec.device)
    except RuntimeError:
        raise UserError(
            f"rewards.device={spec.device}: no device; use auto, cpu, cuda or cuda:N."
        ) from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"rewards.device={spec.device}: this process sees {torch.cuda.device_count()} GPUs; "
            "use one of them or cpu."
        )
    return chosen


def dtype(spec: RewardSpec) -> torch.dtype:
    """Precision of the weights."""
    return torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
