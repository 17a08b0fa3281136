"""Standard output and error as a command shows things on them: neither can end it or be abused.

A reader that went away, a lost terminal, a full disk or a closed stream: what is shown is dropped,
the work goes on. An alphabet that lacks a letter gets its escape. Control characters in names,
prompts or files are shown escaped: on a terminal they would move, colour and erase.
"""

import errno
import io
import os
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a stream that nobody reads any longer: `| head`, a closed terminal, `>&-`."""
CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x2028, 0x2029)
ESCAPES = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*CONTROLS, *REORDERING)
    if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    """The text with each control character but a new line and a tabulator as its escape."""
    return text.translate(ESCAPES)


class Lossy(io.TextIOBase):
    """A text stream that can be lost, which is noted and raises nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        self.told = ""  # what becomes of the work, for the line on stderr; empty: no line
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> io.BufferedIOBase:
        """The bytes below, for who writes bytes."""
        return getattr(self._stream, "buffer", None) or io.BytesIO()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("a closed stream has no number")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self._stream is not None and self.lost is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        closed = OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.lost = error if isinstance(error, OSError) else closed
        if self.told:
            print(f"fastgrpo: standard output: {self.lost.strerror}; {self.told}", file=sys.stderr)


class Output(Lossy):
    """A `Lossy` stream that shows control characters escaped.  raw: the same for rich's own"""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self.raw = Lossy(stream)

    def write(self, text: str) -> int:
        self.raw.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self.raw.flush()


def guard() -> None:
    """Put `Output` in the place of standard output and error, once."""
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
    if not isinstance(sys.stderr, Output):
        sys.stderr = Output(sys.stderr)


def go_on_without(what: str) -> None:
    """Have a line on stderr say, should standard output be lost, what becomes of the work."""
    if isinstance(sys.stdout, Output):
        sys.stdout.raw.told = what


def refused() -> str:
    """Why results that standard output should have are lost; empty where they are not.

    A reader that went away has what it wanted, and work that goes on without has been told.
    """
    if not isinstance(sys.stdout, Output):
        return ""
    sys.stdout.flush()
    lost, told = sys.stdout.raw.lost, sys.stdout.raw.told
    return "" if lost is None or lost.errno in GONE or told else str(lost.strerror)
