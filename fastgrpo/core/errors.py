"""The one error for a user's mistake: printed as a single line, exit code 2, no stack trace."""


class UserError(ValueError):
    """A mistake of the user's. The message reads `where=value: what is wrong; what to do`."""
