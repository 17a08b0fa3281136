"""`fastgrpo report`, `watch` and `status`: what a run has done, and where its ranks are."""

import argparse
import os
import secrets

from fastgrpo.cli.options import path, positive
from fastgrpo.core.errors import UserError


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo report`."""
    command = commands.add_parser(
        "report",
        help="write the HTML report of a run",
        description="Write run.dir/report.html, one self-contained page, from the files of a "
        "finished or running run.",
    )
    command.set_defaults(action=_run_report)
    command.add_argument("run", type=path("run"), help="a run folder, such as runs/t2v_tiny")


def add_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo watch`."""
    command = commands.add_parser(
        "watch",
        help="a run's report as a page that keeps itself up to date",
        description="Serve the report of a run while it goes on, with the time left, the slowest "
        "rank, GPU memory and the newest clips; from any machine that sees the run's folder. The "
        "address that is printed has a token: it is read from --token-file or FASTGRPO_TOKEN, else "
        "drawn anew. Binding beyond this machine needs --token-file. Ctrl-C ends it.",
    )
    command.set_defaults(action=_run_watch)
    command.add_argument("run", type=path("run"), help="a run folder, such as runs/t2v_tiny")
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    command.add_argument(
        "--port", type=int, default=8800, help="0 takes a free one (default: %(default)s)"
    )
    command.add_argument(
        "--token-file", type=path("--token-file"), help="file with the token of the page's address"
    )


def add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo status`."""
    command = commands.add_parser(
        "status",
        help="where each rank of a run is, and which one seems dead or hung",
        description="Read the heartbeats in a run folder, from any machine that sees it: "
        "iteration, phase, for how long, when last heard and the innermost functions of each rank, "
        "those in trouble first. The exit code is 1 where a rank failed or seems dead or hung.",
    )
    command.set_defaults(action=_run_status)
    command.add_argument("run", type=path("run"), help="a run folder, such as runs/t2v_tiny")
    command.add_argument(
        "--limit",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="silent for longer: dead; in a phase for longer, and three times as long as ever "
        "before: hung (default: %(default)s)",
    )


def _run_report(arguments: argparse.Namespace) -> None:
    from fastgrpo.tools.report.report import write_report

    print(write_report(arguments.run))


def _run_status(arguments: argparse.Namespace) -> int:
    from fastgrpo.tools.status import status

    return 0 if status(arguments.run, arguments.limit) else 1


def _run_watch(arguments: argparse.Namespace) -> None:
    from fastgrpo.rewards.serving.server.process import LOOPBACK
    from fastgrpo.tools.report.live.server import watch
    from fastgrpo.training.scoring.sources import token_of

    file, host = arguments.token_file, arguments.host
    if file is None and host not in LOOPBACK:
        raise UserError(f"--host={host}: reachable from other machines; give --token-file, too.")
    if file is None and not os.environ.get("FASTGRPO_TOKEN"):
        token = secrets.token_urlsafe(24)
    else:
        token = token_of(file, "--token-file")
    if host not in LOOPBACK and len(token) < 16:
        raise UserError(
            f"--host={host}: reachable from other machines; give a token of at least 16 random "
            "characters."
        )
    watch(arguments.run, host, arguments.port, token)
