"""The one error for a user's mistake: printed as a single line, exit code 2, no stack trace."""


class UserError(ValueError):
    """A mistake of the user's. The message reads `where=value: what is wrong; what to do`."""


class Exploded(UserError):
    """Weights or gradients that are not finite any more: the run cannot go on from them."""

    def __init__(self, message: str, drawn: bool) -> None:
        """drawn: whether samples of the newest weights show it, not their gradients."""
        super().__init__(message)
        self.drawn = drawn
