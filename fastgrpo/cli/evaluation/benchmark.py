"""The options of a benchmark: its judges and its prompts."""

import argparse
from typing import TYPE_CHECKING

from fastgrpo.cli.options import path, text_of
from fastgrpo.core.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.tools.evaluate.benchmark.measuring import Wanted

OPTIONS = ("--weights", "--judge", "--geneval-prompts", "--hps-prompts")
"""Those that only a benchmark has."""


def add_benchmark_options(command: argparse.ArgumentParser) -> None:
    """What a benchmark needs beside `evaluate`'s own options, `--weights` apart."""
    add = command.add_argument_group("benchmark").add_argument
    add(
        "--judge",
        action="append",
        default=[],
        metavar="COLUMN=REWARD.PART",
        help="another reward in the place of a column's judge, marked as a stand-in; may be "
        "repeated",
    )
    add(
        "--geneval-prompts",
        type=path("--geneval-prompts"),
        metavar="FILE",
        help="GenEval's evaluation_metadata.jsonl (default: the official one, which is shipped)",
    )
    add(
        "--hps-prompts",
        type=path("--hps-prompts"),
        metavar="FOLDER",
        help="the HPS benchmark's prompts, one file per style",
    )


def refuse_benchmark_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that has no effect without --benchmark."""
    for option in OPTIONS:
        if getattr(arguments, option.lstrip("-").replace("-", "_")):
            raise UserError(
                f"{option}: has no effect without --benchmark; add it, or leave it out."
            )


def wanted_of(arguments: argparse.Namespace, benchmark: str) -> "Wanted":
    """The benchmark as the command line has it."""
    from fastgrpo.tools.evaluate.benchmark.measuring import Wanted

    return Wanted(
        benchmark=benchmark,
        rewards=tuple(arguments.rewards),
        judges=tuple(arguments.judge),
        weights=arguments.weights,
        prompts=text_of(arguments.prompts),
        geneval=arguments.geneval_prompts,
        hps=arguments.hps_prompts,
        limit=arguments.limit,
        images=arguments.seeds,
        batch_size=arguments.batch_size,
    )
