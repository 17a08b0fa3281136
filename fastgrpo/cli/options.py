"""Options that several commands share, and the types of their values."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.core.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.core.config import Recipe


@dataclass(frozen=True)
class TypedPath:
    """A path as a person typed it, for an option or argument."""

    text: str
    where: str  # the option or argument, for messages
    hub: bool = False  # whether a hub id is meant where nothing here has that name

    def meant(self) -> Path | str:
        """The path, or the hub id. Raises UserError for what is no path."""
        from fastgrpo.core.config.paths import expanded, is_hub_id

        if self.hub and is_hub_id(self.text) and not os.path.lexists(self.text):
            return self.text
        return Path(expanded(self.text, self.where))


def path(where: str, hub: bool = False) -> Callable[[str], TypedPath]:
    """The type of an option or argument that is a path.  where: how messages call it"""
    return partial(TypedPath, where=where, hub=hub)


def with_paths(arguments: argparse.Namespace) -> dict[str, Path]:
    """Put paths in the place of what was typed for them.  returns each by its option

    Raises UserError for what is no path.
    """
    named: dict[str, Path] = {}
    for name, value in vars(arguments).items():
        typed = value if isinstance(value, list) else [value]
        if not typed or not isinstance(typed[0], TypedPath):
            continue
        meant = [one.meant() for one in typed]
        setattr(arguments, name, meant if isinstance(value, list) else meant[0])
        named |= {
            one.where: found
            for one, found in zip(typed, meant, strict=True)
            if isinstance(found, Path)
        }
    return named


def text_of(file: Path | None) -> str | None:
    """A path as text. None: none was given."""
    return None if file is None else str(file)


def check_target(option: str, file: Path | None) -> None:
    """Raise UserError, before hours of work, for a file that could not be written."""
    from fastgrpo.core.config.paths import file_problem

    if file is None or str(file) == "-":
        return
    if problem := file_problem(file):
        raise UserError(
            f"{option}={file}: cannot be written there ({problem}); name a file in a folder that "
            "exists."
        )


def check_folder_target(option: str, folder: Path) -> None:
    """Raise UserError, before hours of work, for a folder that could not be made or written."""
    from fastgrpo.core.config.paths import folder_problem

    if problem := folder_problem(folder):
        raise UserError(f"{option}={folder}: {problem}; choose another folder or correct that.")


def add_recipe(command: argparse.ArgumentParser) -> None:
    """The recipe and its overrides."""
    command.add_argument(
        "recipe", type=path("recipe"), help="a TOML file, such as launch/t2v_tiny.toml"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="a recipe key to set; `fastgrpo keys` lists them",
    )


def recipe_of(arguments: argparse.Namespace) -> "Recipe":
    """The recipe that the arguments name. Raises UserError."""
    from fastgrpo.core import config
    from fastgrpo.training import methods

    recipe = config.load(arguments.recipe, arguments.overrides)
    methods.check(recipe)
    return recipe


def add_which_weights(command: argparse.ArgumentParser) -> None:
    """The options that say which of a run's weights are meant."""
    command.add_argument(
        "--step",
        default="newest",
        metavar="N",
        help="checkpoint: a number, best or newest (default)",
    )
    command.add_argument(
        "--raw-weights", action="store_true", help="not the moving average where the run kept one"
    )


def step_of(text: str, option: str = "--step") -> Any:
    """The value of an option that names a checkpoint: "best", "newest" or a number."""
    if text in ("best", "newest"):
        return text
    number = text.removeprefix("step-")
    if not number.isdecimal():
        raise UserError(f"{option}={text}: not a checkpoint; use a number, best or newest.")
    return int(number)


def rate(text: str) -> float:
    """An option's value that says how much of something there is in a second."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def positive(text: str) -> int:
    """An option's value that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
