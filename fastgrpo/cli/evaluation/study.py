"""`fastgrpo study`: blind pairs for human raters, and what their votes say."""

import argparse

from fastgrpo.cli.options import add_which_weights, check_target, path, positive, step_of, text_of
from fastgrpo.core.errors import UserError

BUILDING = ("out", "prompts", "question")
"""Options that say how a study is made, and nothing where its votes are read."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo study`."""
    command = commands.add_parser(
        "study",
        help="blind pairs for human raters, and what their votes say",
        description="Write a folder with a page of blind pairs, which opens from a disk without a "
        "server: clips of a run beside those of its base model or of an earlier checkpoint, of the "
        "same prompt and noise. With --read, say what the votes that raters saved from it mean. "
        "See docs/guides/evaluation.md.",
    )
    command.set_defaults(action=_run_study)
    command.add_argument(
        "run", nargs="?", type=path("run"), help="a run folder, such as runs/t2v_tiny, or an export"
    )
    _add_pairs(command)
    add_which_weights(command)
    add = command.add_argument_group("reading the votes").add_argument
    add("--read", type=path("--read"), metavar="FOLDER", help="a study with files in FOLDER/votes")
    add("--json", type=path("--json"), metavar="OUT", help="write every number there; - prints it")
    add("--markdown", type=path("--markdown"), metavar="OUT", help="the table; - prints it")


def _add_pairs(command: argparse.ArgumentParser) -> None:
    """The options that say which pairs a study has, and where it goes."""
    add = command.add_argument_group("the pairs").add_argument
    add(
        "--against",
        default="base",
        metavar="MODEL",
        help="base (default), or a checkpoint of the run: a number, best or newest",
    )
    add(
        "--pairs",
        type=positive,
        default=50,
        metavar="N",
        help="a pair per prompt, and more from further seeds (default: %(default)s)",
    )
    add(
        "--prompts",
        type=path("--prompts"),
        metavar="FILE",
        help="a file of prompts (default: the recipe's held-out ones)",
    )
    add("--question", metavar="TEXT", help="what raters are asked (default: which one is better)")
    add(
        "--out",
        type=path("--out"),
        metavar="DIR",
        help="a new folder (default for a run: RUN/studies/step-N)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="any recipe key; may be repeated",
    )


def _run_study(arguments: argparse.Namespace) -> None:
    """`fastgrpo study`: write a study, or print what its votes say."""
    if (arguments.run is None) == (arguments.read is None):
        raise UserError("study: give a run to write a study of, or --read FOLDER, one of both.")
    if arguments.read is None:
        _build(arguments)
    else:
        _read(arguments)


def _build(arguments: argparse.Namespace) -> None:
    """Write a study's folder, and say what to do with it."""
    from diffusers.utils import logging

    from fastgrpo.tools.evaluate.study import build
    from fastgrpo.tools.sample.source import Asked

    for option in ("json", "markdown"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option}: is for --read; leave it out.")
    asked = Asked(
        source=str(arguments.run),
        step=step_of(arguments.step),
        raw=arguments.raw_weights,
        overrides=tuple(arguments.set),
    )
    against = None if arguments.against == "base" else arguments.against
    wanted = build.Wanted(
        pairs=arguments.pairs,
        against=None if against is None else step_of(against, "--against"),
        file=text_of(arguments.prompts),
        out=arguments.out,
        question=build.QUESTION if arguments.question is None else arguments.question,
    )
    logging.disable_progress_bar()  # every rank would show its own
    built = build.build(asked, wanted)
    if not built.main:
        return
    print(f"{built.pairs} pairs in {built.folder}")
    print(f"give raters the folder {built.folder / build.PAGE}, and no other: index.html opens it")
    print(f"put their files into {built.folder / build.VOTES}, then: ", end="")
    print(f"fastgrpo study --read {built.folder}")
    if built.not_finite:
        print(f"{built.not_finite} more pairs are left out: latents or pixels are not finite")


def _read(arguments: argparse.Namespace) -> None:
    """Print what the votes of a study say."""
    from fastgrpo.tools.evaluate.study import analyse, build, votes
    from fastgrpo.tools.evaluate.study.blinding import read_key
    from fastgrpo.tools.score import score

    for option in BUILDING:
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option}: is for writing a study; leave it out with --read.")
    targets = {"--json": arguments.json, "--markdown": arguments.markdown}
    for option, file in targets.items():
        check_target(option, file)
    key, study = read_key(arguments.read)
    result = analyse.analyse(key, votes.read_votes(arguments.read / build.VOTES, key, study))
    if arguments.json is not None:
        score.write("--json", arguments.json, result.to_json())
    if arguments.markdown is not None:
        score.write("--markdown", arguments.markdown, result.markdown())
    if "-" not in map(str, targets.values()):
        result.show()
