"""What a run that ends by an error leaves: its report with the cause, or nothing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgrpo.checkpoint.resume import holds_run, remove_unbegun
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import OneRankError
from fastgrpo.run import heartbeat
from fastgrpo.tools.report.report import write_report


@contextmanager
def told(folder: Path, own: int, found: bool) -> Iterator[None]:
    """Where the body ends by an error, write the report, or leave no trace of an unbegun run.

    The main rank does, which holds the folder's lock. Another rank writes the report where it fails
    alone, since the main one may wait for it until torchrun kills it.

    own: this process's rank;  found: whether the folder was there before
    """
    try:
        yield
    except BaseException as error:
        evaluated = any(folder.glob("evaluation/step-*.json"))  # which is something to look at
        if not own and not holds_run(folder) and not evaluated:
            if "reward_server.log" not in str(error):  # which a person is to read
                remove_unbegun(folder, found)
        elif isinstance(error, Exception) and (not own or failed_alone(folder, own, error)):
            with suppress(UserError, OSError):  # the error itself matters more
                write_report(folder)
        raise


def failed_alone(folder: Path, own: int, error: Exception) -> bool:
    """Whether a rank is the first to fail, by an error that does not end all ranks together."""
    if isinstance(error, UserError) and not isinstance(error, OneRankError):
        return False
    first = heartbeat.first_failure(folder)
    return first is not None and first.rank == own and holds_run(folder)
