"""`fastgrpo score` and `fastgrpo check-reward`: what rewards say of files, and if they may."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastgrpo.cli.evaluation.servers import add_servers, asked_servers
from fastgrpo.cli.options import check_target, path, text_of
from fastgrpo.core.errors import UserError

if TYPE_CHECKING:
    from fastgrpo.tools.score.judges import Asked as AskedRewards


def add_score(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo score`."""
    command = commands.add_parser(
        "score",
        help="what any reward says of clips and pictures",
        description="Score video and picture files with one or several rewards: a table, and with "
        "--json everything. A clip's prompt is --prompt, its line of --prompts, the .txt of the "
        "same name beside it, or what the manifest of `fastgrpo sample` says. A file that cannot "
        "be scored is listed with the reason; a single one is an error.",
    )
    command.set_defaults(action=_run_score)
    command.add_argument(
        "files",
        nargs="+",
        type=path("FILES"),
        metavar="FILES",
        help="mp4, png, jpg ..., or a folder of them",
    )
    add = command.add_argument_group("rewards").add_argument
    add(
        "--reward",
        action="append",
        default=[],
        metavar="NAME",
        help="a file of rewards/; may be repeated",
    )
    add(
        "--recipe",
        type=path("--recipe"),
        metavar="FILE",
        help="rewards of a recipe, or of a file with [[rewards]] alone",
    )
    _add_settings(add)
    add_servers(command)
    _add_clips(command)
    command.add_argument(
        "--json",
        type=path("--json"),
        metavar="OUT",
        help="write everything there; - prints it, and no table",
    )


def _add_settings(add: Callable[..., object]) -> None:
    """The options that set a reward's keys.  add: of the parser, or of a group of it"""
    add("--path", action="append", default=[], metavar="[NAME=]PATH", help="a reward's weights")
    add(
        "--option",
        action="append",
        default=[],
        metavar="[NAME.]key=value",
        help="what only that reward knows",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="[NAME.]key=value",
        help="another key: frames, dtype, device ...",
    )


def add_check_reward(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo check-reward`."""
    command = commands.add_parser(
        "check-reward",
        help="does a reward, such as one of your own, keep the contract",
        description="Try a reward on a few clips: shapes, NaN, order and batches, odd prompts, frames, "
        "the golden clip, behind a reward server, and the time for a clip. The exit code is 1 where "
        "it breaks a rule. See docs/extending.md.",
    )
    command.set_defaults(action=_run_check_reward)
    command.add_argument(
        "name",
        metavar="FILE_OR_NAME",
        help="./my_reward.py, ./my_reward.py:function, or a reward's name",
    )
    command.add_argument(
        "--recipe",
        type=path("--recipe"),
        metavar="FILE",
        help="take its settings from a recipe, or from a file with [[rewards]] alone",
    )
    _add_settings(command.add_argument)
    command.add_argument(
        "--clips",
        type=path("--clips"),
        metavar="FOLDER",
        help="try it on these clips, with their prompts beside them (default: its own examples, or "
        "drawn ones)",
    )
    command.add_argument(
        "--rows",
        type=path("--rows"),
        metavar="FILE",
        help="a prompt file whose columns the clips' prompts get, for a reward that names COLUMNS",
    )
    command.add_argument(
        "--no-server", action="store_true", help="leave out the check behind a reward server"
    )


def _add_clips(command: argparse.ArgumentParser) -> None:
    """The options that describe the clips to score."""
    add = command.add_argument_group("clips").add_argument
    add("--prompt", metavar="TEXT", help="of every file")
    add(
        "--prompts",
        type=path("--prompts"),
        metavar="FILE",
        help="one prompt for each file, in their order",
    )
    add("--fps", type=rate, metavar="FPS", help="said to the rewards (default: what the file says)")
    add(
        "--size",
        type=size,
        metavar="HxW",
        help="pixels in which the clips were made, where their files are enlarged by a whole "
        "factor (default: what the manifest of `fastgrpo sample` says, else as they are)",
    )


def _run_score(arguments: argparse.Namespace) -> None:
    """`fastgrpo score`: print the table."""
    from fastgrpo.tools.score import judges, score

    servers = asked_servers(arguments)
    if servers.urls and (arguments.path or arguments.option or arguments.set):
        raise UserError(
            "--server: its rewards have their own settings; leave out --path, --option and --set."
        )
    check_target("--json", arguments.json)
    specs = judges.specs(_asked_rewards(arguments, arguments.reward))
    wanted = score.Wanted(
        files=tuple(arguments.files),
        prompt=arguments.prompt,
        prompts=text_of(arguments.prompts),
        fps=arguments.fps,
        size=arguments.size,
    )
    result = score.score(wanted, specs, servers)
    if arguments.json is not None:
        score.write("--json", arguments.json, result.to_json())
    if str(arguments.json) != "-":
        score.show(result)


def _run_check_reward(arguments: argparse.Namespace) -> int:
    """`fastgrpo check-reward`.  returns 0 where the reward keeps the contract, else 1"""
    from fastgrpo.tools.check.reward import check_reward, clips_of, with_rows
    from fastgrpo.tools.score import judges

    (spec,) = judges.specs(_asked_rewards(arguments, [arguments.name]))
    tried = None if arguments.clips is None else clips_of(arguments.clips)
    if arguments.rows is not None:
        tried = with_rows(spec, tried, arguments.rows)
    return check_reward(spec, tried, not arguments.no_server)


def _asked_rewards(arguments: argparse.Namespace, names: Sequence[str]) -> "AskedRewards":
    """The rewards of these names, with the settings of the command line."""
    from fastgrpo.tools.score.judges import Asked

    return Asked(
        names=tuple(names),
        file=arguments.recipe,
        paths=tuple(arguments.path),
        options=tuple(arguments.option),
        settings=tuple(arguments.set),
    )


def size(text: str) -> tuple[int, int]:
    """The value of --size."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError("must be height x width, such as 32x32")
    return int(match[1]), int(match[2])


def rate(text: str) -> float:
    """The value of --fps."""
    number = float(text)
    if not 0 < number <= 1000:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1000")
    return number
