"""The one error for a user's mistake: printed as a single line, exit code 2, no stack trace."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Sent(Exception):
    """An error that ranks can send each other, whatever its constructor takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the constructor, which would take the message alone for its arguments."""
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[Sent], args: tuple[object, ...]) -> Sent:
    return kind.__new__(kind, *args)


class UserError(Sent, ValueError):
    """A mistake of the user's. The message reads `where=value: what is wrong; what to do`."""


def described(error: BaseException, file: Path | None = None) -> str:
    """An error's class, text and place, in one line: of code that the user wrote.

    file: the user's, whose line is told where the error passed through it; None: where it arose
    """
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else "no message"
    if isinstance(error, SyntaxError):
        text, places = error.msg, [(error.filename or "", error.lineno or 0)]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno or 0) for frame in frames]
    own = [place for place in places if file is not None and Path(place[0]) == file]
    at = (own or places)[-1:]
    return f"{type(error).__name__}: {text}" + "".join(f", at {name}:{line}" for name, line in at)


@contextmanager
def blaming(where: str, file: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a user's file raises inside into a UserError that tells text and place.

    A UserError goes on as it is, and so does a GPU without memory: that is no fault of the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # anyone's code may raise anything
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise UserError(f"{where}: {described(error, file)}; {remedy}") from None


class Unavailable(Sent):
    """What a reward asks elsewhere does not answer: no fault of the clips, and it may come back.

    Whoever called asks again with the same clips, for as long as the recipe waits for scores.
    """

    def __init__(self, trouble: str, progress: bool) -> None:
        """progress: whether some of the call's questions were answered, and are kept."""
        super().__init__(trouble)
        self.progress = progress


class Exploded(UserError):
    """Weights or gradients that are not finite any more: the run cannot go on from them."""

    def __init__(self, message: str, drawn: bool) -> None:
        """drawn: whether samples of the newest weights show it, not their gradients."""
        super().__init__(message)
        self.drawn = drawn


class Hacked(UserError):
    """A reward that rises while the clips get worse, where the recipe ends the run for it.

    The weights can still be saved.
    """


class UserErrors(UserError):
    """Several mistakes, a line for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)
