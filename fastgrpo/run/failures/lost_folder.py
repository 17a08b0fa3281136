"""A run folder that goes away or turns read-only under the run: one line, and no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgrpo.core.files import problem_of
from fastgrpo.core.processes import fail_alone


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Turn what the system says against a file of the folder into OneRankError, printed at once."""
    try:
        yield
    except OSError as error:
        names = {str(name) for name in (error.filename, error.filename2) if name is not None}
        if not any(Path(name).is_relative_to(folder) for name in names):
            raise
        fail_alone(
            f"run.dir={folder}: {problem_of(error)}; correct that and start again: the run resumes "
            "from its newest checkpoint."
        )
