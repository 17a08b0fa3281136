"""`fastgrpo reproduce`: a table or figure of the paper, or what it takes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.cli.evaluation.benchmark import add_benchmark_options
from fastgrpo.cli.evaluation.evaluate import add_by_what
from fastgrpo.cli.options import check_folder_target, path, positive
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.reproduce.entries import Entry, entry_of

if TYPE_CHECKING:
    from fastgrpo.tools.evaluate.reproduce.recipes import Options

PASSED_ON = ("rewards", "judge", "prompts", "geneval_prompts", "hps_prompts", "limit", "seeds")
"""Options that `evaluate --benchmark` is given as they are."""


def add_reproduce(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo reproduce`."""
    command = commands.add_parser(
        "reproduce",
        help="a table or figure of the paper: its runs, then its numbers",
        description="Train what a table or figure of DanceGRPO's paper needs and make it: a table "
        "by `evaluate --benchmark`, curves, or sheets of pictures. Finished runs are not run "
        "again. With --dry-run only say which recipes, rewards and checkpoints, how many GPU-hours "
        "by `plan`, and what has to be downloaded, with sizes and licences.",
    )
    command.set_defaults(action=_run_reproduce)
    command.add_argument(
        "entry", metavar="TABLE_OR_FIGURE", help="table1 to table6, figure1 to figure19, figure4a"
    )
    add = command.add_argument
    add(
        "--weights",
        type=path("--weights"),
        required=True,
        metavar="FOLDER",
        help="weights of judges and models, by the names that launch/ uses",
    )
    add("--dry-run", action="store_true", help="say what it takes, and do nothing")
    add(
        "--recipes-only",
        action="store_true",
        help="write the runs' recipes into OUT/recipes and stop, for a scheduler",
    )
    add(
        "--out",
        type=path("--out"),
        metavar="OUT",
        help="folder of runs and results (default: runs/reproduce)",
    )
    add(
        "--launch",
        type=path("--launch"),
        default=None,
        metavar="FOLDER",
        help="folder of the recipes (default: launch)",
    )
    add(
        "--recipe",
        type=path("--recipe"),
        metavar="FILE",
        help="in place of every recipe of launch/, as a stand-in",
    )
    add("--gpu", default="h800", metavar="NAME", help="for the plan (default: %(default)s)")
    add("--gpus", type=positive, metavar="N", help="for the plan (default: the paper's number)")
    add_by_what(command)
    add_benchmark_options(command)


def _run_reproduce(arguments: argparse.Namespace) -> None:
    """`fastgrpo reproduce`: say what it takes, or do it."""
    from fastgrpo.tools.evaluate.benchmark import choosing
    from fastgrpo.tools.evaluate.reproduce import dry_run
    from fastgrpo.tools.evaluate.reproduce.recipes import Options

    name, entry = entry_of(arguments.entry)
    options = Options(
        weights=dry_run.exists(arguments.weights),
        out=arguments.out or Path("runs/reproduce"),
        launch=arguments.launch or Path("launch"),
        recipe=arguments.recipe,
        judges=choosing.parse_judges(arguments.judge),
        files=choosing.read_files(arguments.rewards),
        settings=tuple(arguments.set),
    )
    if arguments.dry_run:
        fleet = dry_run.Fleet(arguments.gpu, arguments.gpus)
        print("\n".join(dry_run.lines(name, entry, options, fleet)))
        return
    if entry.output == "settings":
        raise UserError(
            f"TABLE_OR_FIGURE={name}: there is nothing to run; add --dry-run for the comparison."
        )
    check_folder_target("--out", options.out)
    _carry_out(name, entry, options, arguments)


def _carry_out(name: str, entry: Entry, options: "Options", arguments: argparse.Namespace) -> None:
    """The runs, or their recipes alone."""
    from fastgrpo.tools.evaluate.reproduce import carrying_out

    if arguments.recipes_only:
        files = [*carrying_out.write_recipes(entry, options).values()]
    else:
        files = carrying_out.carry_out(
            name, entry, options, _passed_on(arguments), carrying_out.start
        )
    for file in files:
        print(file)


def _passed_on(arguments: argparse.Namespace) -> list[str]:
    """Options of `evaluate --benchmark`, as they were given."""
    words = ["--weights", str(arguments.weights), "--batch-size", str(arguments.batch_size)]
    for key in PASSED_ON:
        value = getattr(arguments, key)
        option = f"--{key.replace('_', '-')}"
        if key == "rewards":
            words += [option, *value] if value else []
        elif isinstance(value, list):
            words += [word for one in value for word in (option, one)]
        elif value is not None:
            words += [option, str(value)]
    return [*words, *(["--steps", str(arguments.steps)] if arguments.steps else [])]
