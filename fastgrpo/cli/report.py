"""`fastgrpo report` and `fastgrpo status`: what a run has done, and where its ranks are."""

import argparse

from fastgrpo.cli.options import path, positive


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
