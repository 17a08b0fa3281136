"""`fastgrpo serve-rewards` and `fastgrpo convert-videoalign`."""

import argparse
import os
from typing import TYPE_CHECKING

from fastgrpo.cli.options import check_folder_target, check_target, path
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import MIB

if TYPE_CHECKING:
    from fastgrpo.core.config import RewardSpec


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of both."""
    _add_serve(commands)
    _add_convert(commands)


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve-rewards",
        help="serve rewards over HTTP",
        description="Serve rewards over HTTP: the ones named, with their settings at their "
        "defaults, or with --recipe "
        'those of a recipe that have where = "server". The bearer token is read from '
        "--token-file, or from the environment variable FASTGRPO_TOKEN. Binding beyond "
        "this machine needs --token-file. SIGTERM ends it in good order. See "
        "docs/guides/rewards/server.md.",
    )
    serve.set_defaults(action=serve_rewards)
    serve.add_argument(
        "rewards",
        nargs="*",
        metavar="NAME",
        help="rewards, such as tiny_world or ./my_reward.py; with --recipe: section.key=value "
        "overrides",
    )
    serve.add_argument(
        "--recipe",
        type=path("--recipe"),
        help="serve this recipe's [[rewards]], with their settings",
    )
    serve.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="of the recipe's rewards only this one; repeat",
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    serve.add_argument(
        "--port", type=int, default=8700, help="0 takes a free one (default: %(default)s)"
    )
    serve.add_argument(
        "--token-file",
        type=path("--token-file"),
        help="file with the bearer token that clients must send",
    )
    serve.add_argument(
        "--ready-file",
        type=path("--ready-file"),
        help="written with url and pid once the server listens",
    )
    _add_limits(serve)


def _add_limits(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--max-waiting",
        type=int,
        default=1024,
        metavar="MIB",
        help="clips read or waiting (default: %(default)s MiB)",
    )
    serve.add_argument(
        "--max-working",
        type=int,
        default=4096,
        metavar="MIB",
        help="what the rewards take to judge a batch, beside its clips (default: %(default)s MiB)",
    )
    serve.add_argument(
        "--batch-wait",
        type=float,
        default=10.0,
        metavar="MS",
        help="how long a clip waits for others of its shape (default: %(default)g ms)",
    )


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser(
        "convert-videoalign",
        help="make VideoAlign's published checkpoint one safetensors file",
        description="Fold the adapters of a published VideoAlign (VideoReward) folder into its "
        "weights and write them as one safetensors file with its origin. A server loads that "
        "instead, without a pickle; scores are equal.",
    )
    convert.set_defaults(action=_run_convert)
    convert.add_argument(
        "source",
        metavar="SRC",
        type=path("SRC"),
        help="the folder with model_config.json and checkpoint-N",
    )
    convert.add_argument(
        "target", metavar="DST", type=path("DST"), help="a new folder, or SRC itself"
    )
    convert.add_argument(
        "--base",
        type=path("--base", hub=True),
        help="folder or hub id of Qwen2-VL-2B-Instruct (default: what SRC names)",
    )
    convert.add_argument(
        "--dtype",
        choices=("bfloat16",),
        help="a smaller file, for rewards.dtype=bfloat16 alone (default: exact)",
    )


def serve_rewards(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM. Raises UserError for what does not go together."""
    from fastgrpo.rewards.serving.server import process
    from fastgrpo.rewards.serving.server.admission import Limits
    from fastgrpo.training.scoring.sources import token_of

    file = arguments.token_file
    check_target("--ready-file", arguments.ready_file)
    if file is None and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"--host={arguments.host}: reachable from other machines; give --token-file, too."
        )
    if file is None and not os.environ.get("FASTGRPO_TOKEN"):
        raise UserError("--token-file: no token; give a file with one, or set FASTGRPO_TOKEN.")
    token = token_of(file, "--token-file")
    if arguments.max_working < 1:
        raise UserError(f"--max-working={arguments.max_working}: must be at least 1 MiB.")
    if arguments.max_waiting < 1 or not 0 <= arguments.batch_wait <= 10_000:
        raise UserError("--max-waiting, --batch-wait: must be at least 1 MiB, and 0 to 10000 ms.")
    limits = Limits(
        max_waiting=arguments.max_waiting * MIB,
        max_working=arguments.max_working * MIB,
        batch_wait_s=arguments.batch_wait / 1e3,
    )
    process.serve(
        served_specs(arguments),
        host=arguments.host,
        port=arguments.port,
        token=token,
        ready_file=arguments.ready_file,
        limits=limits,
    )


def served_specs(arguments: argparse.Namespace) -> "list[RewardSpec]":
    """The rewards that serve-rewards is asked for."""
    from fastgrpo.core import config
    from fastgrpo.rewards import check, plain

    if arguments.recipe is None:
        if not arguments.rewards or arguments.only:
            raise UserError(
                "serve-rewards: nothing to serve; name rewards, or give --recipe (and then --only)."
            )
        named = [plain(name) for name in arguments.rewards]
        for spec in named:
            check(spec)
        return named
    recipe = config.load(arguments.recipe, arguments.rewards)
    specs = [spec for spec in recipe.rewards if spec.where == "server"]
    missing = [name for name in arguments.only or () if name not in [spec.name for spec in specs]]
    if not specs:
        raise UserError(
            f"--recipe={arguments.recipe}: no reward with where='server'; it has none. Add "
            f"rewards.0.where=server to serve {recipe.rewards[0].name}."
        )
    if missing:
        has = ", ".join(spec.name for spec in specs)
        raise UserError(
            f"--only={missing[0]}: {arguments.recipe} has no such reward with where='server', only "
            f"{has}."
        )
    return [spec for spec in specs if not arguments.only or spec.name in arguments.only]


def _run_convert(arguments: argparse.Namespace) -> None:
    from fastgrpo.rewards.networks.videoalign.convert import convert

    check_folder_target("DST", arguments.target)
    base = None if arguments.base is None else str(arguments.base)
    print(convert(arguments.source, arguments.target, base, arguments.dtype))
