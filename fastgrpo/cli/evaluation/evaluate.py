"""`fastgrpo evaluate`: base against trained, by rewards or by a benchmark."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.cli.evaluation.benchmark import (
    add_benchmark_options,
    refuse_benchmark_options,
    wanted_of,
)
from fastgrpo.cli.evaluation.servers import add_servers, asked_servers
from fastgrpo.cli.options import add_which_weights, check_target, path, positive, step_of, text_of
from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.benchmark.protocols import PROTOCOLS

if TYPE_CHECKING:
    from fastgrpo.tools.sample.source import Asked


@dataclass(frozen=True)
class Answer:
    """A comparison in the forms that it is asked for in."""

    json: Callable[[], str]
    markdown: Callable[[], str]
    show: Callable[[], None]


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo evaluate`."""
    command = commands.add_parser(
        "evaluate",
        help="base against trained on held-out prompts, by several rewards",
        description="Draw the same prompts from the same noise with the base model and the trained "
        "one, and compare them by rewards: means, the paired difference and its 95 % interval, "
        "rewards as columns. Runs in this process or, under torchrun, over all ranks, with the "
        "same result. --step 0 compares the base with itself: all differences are then 0. With "
        "--benchmark the prompts, the images per prompt and the judges are the benchmark's.",
    )
    command.set_defaults(action=_run_evaluate)
    command.add_argument("run", type=path("run"), help="a run folder or an export")
    add_which_weights(command)
    command.add_argument(
        "--benchmark",
        choices=[*PROTOCOLS],
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)}: a benchmark, or a table of the paper",
    )
    command.add_argument(
        "--weights",
        type=path("--weights"),
        metavar="FOLDER",
        help="with --benchmark: the judges' weights, by the names that launch/ uses",
    )
    add_by_what(command)
    add_benchmark_options(command)
    add_servers(command)
    _add_results(command)


def add_by_what(command: argparse.ArgumentParser) -> None:
    """The options on prompts, rewards and sampling."""
    add = command.add_argument_group("by what").add_argument
    add(
        "--rewards",
        nargs="+",
        default=[],
        metavar="NAME|FILE",
        help="rewards by name, or files of [[rewards]] (default: those of the run's recipe)",
    )
    add(
        "--prompts",
        type=path("--prompts"),
        metavar="FILE",
        help="a file of prompts (default: the recipe's held-out ones)",
    )
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="the first N prompts; of a benchmark, of each task or style",
    )
    add("--seeds", type=positive, metavar="K", help="clips per prompt (default: evaluate.seeds)")
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="denoising steps (default: evaluate.steps, or rollout.steps)",
    )
    add(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="clips of one prompt per forward pass (default: 1)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="any recipe key; may be repeated",
    )


def _add_results(command: argparse.ArgumentParser) -> None:
    """The options that say where the comparison is written."""
    add = command.add_argument_group("results").add_argument
    add(
        "--json",
        type=path("--json"),
        metavar="OUT",
        help="write the table and every clip's scores there; - prints them",
    )
    add(
        "--markdown",
        type=path("--markdown"),
        metavar="OUT",
        help="write the table there as Markdown; - prints it",
    )


def _run_evaluate(arguments: argparse.Namespace) -> None:
    """`fastgrpo evaluate`: print the table."""
    from diffusers.utils import logging

    from fastgrpo.tools.sample.source import Asked

    targets = {"--json": arguments.json, "--markdown": arguments.markdown}
    for option, file in targets.items():
        check_target(option, file)
    choice = Asked(
        source=str(arguments.run),
        step=step_of(arguments.step),
        raw=arguments.raw_weights,
        changes={"rollout": {"steps": arguments.steps}} if arguments.steps else {},
        overrides=tuple(arguments.set),
    )
    logging.disable_progress_bar()  # every rank would show its own
    measure = _compare if arguments.benchmark is None else _benchmark
    answer = measure(arguments, choice)
    if answer is not None:
        _tell(targets, answer)


def _compare(arguments: argparse.Namespace, choice: "Asked") -> Answer | None:
    """By the run's own rewards, or those that are named.  returns None on other than rank 0"""
    from fastgrpo.tools.evaluate import evaluate, table

    refuse_benchmark_options(arguments)
    wanted = evaluate.Wanted(
        rewards=tuple(arguments.rewards),
        file=text_of(arguments.prompts),
        limit=arguments.limit,
        seeds=arguments.seeds,
        batch_size=arguments.batch_size,
        servers=asked_servers(arguments),
    )
    result = evaluate.evaluate(choice, wanted)
    if result is None:
        return None
    return Answer(result.to_json, lambda: table.markdown(result), lambda: table.show(result))


def _benchmark(arguments: argparse.Namespace, choice: "Asked") -> Answer | None:
    """By a benchmark's judges on its prompts.  returns None on other than rank 0"""
    from fastgrpo.tools.evaluate.benchmark import measuring

    if arguments.server:
        raise UserError(
            f"--server={arguments.server[0]}: a benchmark's judges have its own settings and are "
            "loaded here; leave it out."
        )
    sheet = measuring.benchmark(choice, wanted_of(arguments, arguments.benchmark))
    return None if sheet is None else Answer(sheet.to_json, sheet.markdown, sheet.show)


def _tell(targets: Mapping[str, Path | None], answer: Answer) -> None:
    """Write the answer where it was asked for, and print it where nothing else is printed."""
    from fastgrpo.tools.score import score

    contents = {"--json": answer.json, "--markdown": answer.markdown}
    for option, file in targets.items():
        if file is not None:
            score.write(option, file, contents[option]())
    if "-" not in map(str, targets.values()):
        answer.show()
