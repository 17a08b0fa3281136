"""Options that several commands share, and the types of their values."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.core.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.core.config import Recipe

Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_recipe(command: argparse.ArgumentParser) -> None:
    """The recipe and its overrides."""
    command.add_argument("recipe", type=Path, help="a TOML file, such as launch/t2v_tiny.toml")
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


def step_of(text: str) -> Any:
    """The value of --step: "best", "newest" or a number."""
    if text in ("best", "newest"):
        return text
    number = text.removeprefix("step-")
    if not number.isdecimal():
        raise UserError(f"--step={text}: not a checkpoint; use a number, best or newest.")
    return int(number)


def positive(text: str) -> int:
    """An option's value that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
