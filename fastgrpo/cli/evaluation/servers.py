"""The options of commands that may ask running reward servers."""

import argparse
from typing import TYPE_CHECKING

from fastgrpo.cli.options import path

if TYPE_CHECKING:
    from fastgrpo.tools.score.judges import Servers


def add_servers(command: argparse.ArgumentParser) -> None:
    """The options that name servers."""
    command.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="ask this running server instead; may be repeated",
    )
    command.add_argument(
        "--token-file",
        type=path("--token-file"),
        metavar="FILE",
        help="the server's bearer token (default: FASTGRPO_TOKEN)",
    )


def asked_servers(arguments: argparse.Namespace) -> "Servers":
    """The servers that were named."""
    from fastgrpo.tools.score.judges import Servers

    return Servers(tuple(arguments.server), arguments.token_file)
