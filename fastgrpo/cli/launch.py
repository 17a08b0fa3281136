"""How a run's processes are started, and how their end is told: in one line, with its exit code.

`main` is the Python half of every launch/*.sh: fix the number of processes, then train. A literal
`torchrun launch/x.sh` starts one process, torchrun's default. On a node with several GPUs that
process replaces itself, once, by a torchrun over all of them. FASTGRPO_PROCESSES names another
number, such as 1 to stay alone.

`python -m fastgrpo.cli.launch` is torchrun, with its options, for all that starts processes here. A
torchrun of its own turns every exit code into 1 and buries what a rank said under its report.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import (
    INTERRUPTED,
    SETTLED,
    SPOKEN_FOR,
    CtrlC,
    after_rank_0,
    processes_to_start,
    rank,
    replace_by_torchrun,
    tell_torchrun,
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
        ctrl_c = CtrlC()
        try:
            if mistake := _check(command, recipe, arguments):
                return _complain(mistake)
            processes = processes_to_start(os.environ)
        except UserError as error:
            return _complain(f"fastgrpo: {error}")
        except KeyboardInterrupt:
            return _interrupted()
        finally:
            ctrl_c.forget()
        if processes > 1:
            replace_by_torchrun([str(recipe.with_suffix(".sh")), *arguments], processes)
    console(["train", str(recipe), *arguments])


def torchrun(arguments: Sequence[str]) -> int:
    """Do what torchrun does.  returns the exit code of the rank that failed first, 0 where none did

    Rank 0 has told a user's mistake, and every rank its own crash; what no rank can tell is told
    here, in one line.
    """
    os.environ[SPOKEN_FOR] = "1"
    ctrl_c = CtrlC()
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        if "LOGLEVEL" not in os.environ:  # torchrun's own
            logging.disable(logging.ERROR)
        try:
            run.main(list(arguments))
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            return _failed(number, failure.exitcode)
        except SignalException as error:
            return _ended_by(error.sigval)
    except KeyboardInterrupt:
        return _interrupted()
    finally:
        ctrl_c.forget()
    return 0


def _failed(number: int, code: int) -> int:
    """The exit code for a rank's; a signal's end, of which no rank can tell, is told."""
    if code >= 0:
        return _interrupted() if code == INTERRUPTED else code
    print(
        f"fastgrpo: rank {number} was ended by {signal.Signals(-code).name}"
        f"{', as the system does where memory runs out' if -code == signal.SIGKILL else ''}; "
        "start again to go on from the newest checkpoint",
        file=sys.stderr,
    )
    return 1


def _ended_by(number: signal.Signals) -> int:
    """The exit code after a signal to torchrun, which has ended the ranks by it."""
    if number == signal.SIGINT:
        return _interrupted()
    print(f"fastgrpo: ended by {signal.Signals(number).name}", file=sys.stderr)
    return 128 + int(number)


def _interrupted() -> int:
    if rank() == 0:
        print("fastgrpo: ended by Ctrl-C", file=sys.stderr)
    return INTERRUPTED


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
        tell_torchrun(message)
    return after_rank_0(USER_ERROR)


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
