"""`fastgrpo train`, `check`, `preflight`, `embed` and `keys`: the commands on a recipe."""

import argparse
import math
import os
from pathlib import Path

from fastgrpo.cli.options import add_recipe, recipe_of
from fastgrpo.core.processes import (
    SETTLED,
    leave,
    processes_to_start,
    rank,
    replace_by_torchrun,
)
from fastgrpo.run.output import go_on_without


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of `train` and `check`."""
    train = commands.add_parser(
        "train",
        help="run a recipe, resuming where it stopped",
        description="Run a recipe in this process, with one process per GPU where a machine has "
        "several (FASTGRPO_PROCESSES sets another number), or, under torchrun, as one of its ranks. "
        "A run folder that already holds a checkpoint of the same recipe is resumed. Ends with the "
        "held-out rewards before and after, in run.dir/summary.json and run.dir/report.html.",
    )
    check = commands.add_parser(
        "check",
        help="check a recipe and print it resolved",
        description="Read a recipe with its overrides, check it and all that it names as far as "
        "that can be told without loading a model, and print it in full; or a line for each "
        "mistake. Nothing is fetched and nothing is written.",
    )
    train.set_defaults(action=_run_train)
    check.set_defaults(action=_run_check)
    add_recipe(train)
    add_recipe(check)


def add_preflight(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo preflight`."""
    command = commands.add_parser(
        "preflight",
        help="check a recipe on this machine before training",
        description="Before a large run: ratio 1 at the recipe's batch sizes, gradients and "
        "weights equal on replicas, shared sequences equal to whole ones, noise, the rewards' "
        "golden clips, decoding, a checkpoint saved and loaded, room for checkpoints, and seconds "
        "and memory per phase. A green or red line each, with the remedy. Alone on a machine with "
        "several GPUs it starts one process per GPU; under torchrun it is one of the ranks. The "
        "exit code is 1 where a line is red. See docs/guides/preflight.md.",
    )
    command.set_defaults(action=_run_preflight)
    add_recipe(command)


def add_embed(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `embed`."""
    embed = commands.add_parser(
        "embed",
        help="encode a recipe's prompts beforehand",
        description="Put every prompt of a recipe through the model's text encoders and keep the "
        "conditions in prompts.cache, or else in run.dir/embeddings. `train` does the same where "
        "it is missing. Runs in this process or, under torchrun, over all ranks; started again "
        "after a kill it goes on with what is missing.",
    )
    embed.set_defaults(action=_run_embed)
    add_recipe(embed)


def add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `keys`."""
    keys = commands.add_parser(
        "keys",
        help="list every recipe key",
        description="Every key of a recipe, by section: name, default, meaning; of one section with "
        "the values that a key may have.",
    )
    keys.add_argument("section", nargs="?", metavar="SECTION", help="such as optimizer; all")
    keys.set_defaults(action=_run_keys)


def _run_train(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(arguments)
    go_on_without(f"training goes on, {recipe.run.dir / 'metrics.jsonl'} has all that it said")
    if SETTLED not in os.environ and (count := processes_to_start(os.environ)) > 1:
        again = ["-m", "fastgrpo.cli", "train", str(arguments.recipe), *arguments.overrides]
        replace_by_torchrun(again, count)
    from fastgrpo.train import train

    summary = train(recipe)
    if summary is not None and rank() == 0:
        print_summary(summary, recipe.run.dir)


def _run_check(arguments: argparse.Namespace) -> None:
    from fastgrpo.data import prompts
    from fastgrpo.tools.check import without_effect
    from fastgrpo.tools.check.check import check

    recipe, split = check(arguments.recipe, arguments.overrides)
    print(f"# {split.summary}")
    for line in without_effect.lines(recipe):
        print(f"# {line}")
    if (few := prompts.few_heldout(recipe, split)) is not None:
        print(f"# {few}")
    if not recipe.run.dir.is_absolute():
        print(f"# run.dir begins at the working folder: {recipe.run.dir.absolute()}")
    print(recipe.to_toml(), end="")


def _run_preflight(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(arguments)
    if (count := processes_to_start(os.environ)) > 1:
        again = ["-m", "fastgrpo.cli", "preflight", str(arguments.recipe), *arguments.overrides]
        replace_by_torchrun(again, count)
    from fastgrpo.tools.preflight.run import run

    if not run(recipe):
        leave(1)


def _run_embed(arguments: argparse.Namespace) -> None:
    from fastgrpo.parallel.world import open_world
    from fastgrpo.tools.check.check import refuse
    from fastgrpo.training.conditions.encode import embed

    go_on_without("encoding goes on")
    recipe = recipe_of(arguments)
    with open_world() as world:
        world.on_main(lambda: refuse(recipe))
        embed(recipe, world)


def _run_keys(arguments: argparse.Namespace) -> None:
    from fastgrpo.core import config

    print(config.describe(arguments.section))


def shortfalls(summary: dict[str, object]) -> list[str]:
    """Lines on what a run did not learn from, by the counts of its summary."""
    from fastgrpo.run.failures import alarms

    counts, iterations = summary.get("counts"), summary["iterations"]
    assert isinstance(iterations, int)
    return alarms.shortfalls(counts if isinstance(counts, dict) else {}, iterations)


def print_summary(summary: dict[str, object], folder: Path) -> None:
    """Print the held-out rewards before and after as a table."""
    from rich.table import Table

    from fastgrpo.run.terminal import open_console

    table = Table(
        title="held-out reward, before and after training (ODE sampler, same prompts and seeds)"
    )
    for column in ("part", "before", "after", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "part" else "right")
    before, after, difference, interval = (
        summary[key] for key in ("before", "after", "difference", "ci95")
    )
    assert isinstance(before, dict) and isinstance(after, dict)
    assert isinstance(difference, dict) and isinstance(interval, dict)
    for part in before:
        low, high = interval[part]
        bounds = f"{low:+.3f} .. {high:+.3f}" if math.isfinite(low) else "-"
        values = f"{before[part]:.3f}", f"{after[part]:.3f}", f"{difference[part]:+.3f}"
        table.add_row(part, *("-" if value.endswith("nan") else value for value in values), bounds)
    console = open_console(markup=False)
    console.print(table)
    for line in shortfalls(summary):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{summary['iterations']} iterations, {summary['wall_seconds']:.0f} s of training",
        highlight=False,
    )
    for name in ("report.html", "summary.json"):
        console.print(f"{folder / name}", highlight=False)
