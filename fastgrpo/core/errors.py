"""The one error for a user's mistake: printed as a single line, exit code 2, no stack trace."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user's. The message reads `where=value: what is wrong; what to do`."""


class UserErrors(UserError):
    """Several mistakes, a line for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)
