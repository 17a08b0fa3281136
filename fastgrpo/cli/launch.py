"""The Python half of every launch/*.sh ends here: fix the number of processes, then train.

A literal `torchrun launch/x.sh` starts one process, torchrun's default. On a node with several GPUs
that process replaces itself, once, by a torchrun over all of them. FASTGRPO_PROCESSES names another
number, such as 1 to stay alone.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import (
    SETTLED,
    after_rank_0,
    processes_to_start,
    rank,
    replace_by_torchrun,
)

USER_ERROR = 2
"""Exit code for a user's mistake."""


def main(recipe: Path, arguments: list[str]) -> int:
    """Train the recipe file `recipe` with the overrides `arguments` ("section.key=value").

    Returns the exit code.
    The code is 2 for a user's mistake. Does not return once training has begun, nor where the
    process is replaced by a torchrun over several.
    """
    # held back, not lost, until fastgrpo.run.stopping hears it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        from fastgrpo.cli.main import console
        from fastgrpo.cli.main import main as command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastgrpo":
            raise
        return _complain(
            f"fastgrpo: python={sys.executable}: no module {error.name} there; run `make venv` in "
            "the checkout."
        )
    if SETTLED not in os.environ:
        if mistake := _check(command, recipe, arguments):
            return _complain(mistake)
        try:
            processes = processes_to_start(os.environ)
        except UserError as error:
            return _complain(f"fastgrpo: {error}")
        if processes > 1:
            replace_by_torchrun([str(recipe.with_suffix(".sh")), *arguments], processes)
    console(["train", str(recipe), *arguments])


def _check(command: Callable[[list[str]], int], recipe: Path, arguments: list[str]) -> str:
    """The message of `fastgrpo check` on a mistake in the recipe; empty where there is none."""
    output = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(output):
        try:
            code: int | str | None = command(["check", str(recipe), *arguments])
        except SystemExit as end:  # the command line itself is wrong
            code = end.code
    return output.getvalue().strip() or f"fastgrpo check: exit code {code}" if code else ""


def _complain(message: str) -> int:
    """Print a user's mistake on rank 0, and again at the end of torchrun's report of failures."""
    if rank() == 0:
        print(message, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(report).write_text(json.dumps({"message": content}))
    return after_rank_0(USER_ERROR)
