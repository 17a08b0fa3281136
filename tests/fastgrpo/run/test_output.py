"""Standard output that is lost ends nothing, and no control character reaches a terminal raw."""

import io
import os
import sys
import unicodedata

import pytest
from rich.table import Table

from fastgrpo.run import output
from fastgrpo.run.output import Output, printable
from fastgrpo.run.terminal import open_console

HOSTILE = "\x1b]0;gone\x07\x1b[2J\x9b31m\r\x08\u202ereversed\u2066"


class Failing(io.StringIO):
    """A stream that fails as the system says, from the first byte on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def raw_controls(text: str) -> set[str]:
    """By Unicode's own classes: controls, and what reorders the letters around it."""
    return {
        letter
        for letter in text
        if (unicodedata.category(letter) == "Cc" and letter not in "\n\t")
        or unicodedata.bidirectional(letter)
        in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }


def test_every_control_character_is_shown_escaped_and_all_else_stays() -> None:
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    shown = printable(everything)
    assert raw_controls(everything) and not raw_controls(shown)
    assert printable("ein Würfel 红色的方块 👩‍🚀\t|\n") == "ein Würfel 红色的方块 👩‍🚀\t|\n"
    assert printable(HOSTILE).encode("ascii").decode("unicode_escape") == HOSTILE


def test_text_from_files_is_escaped_in_lines_and_tables_and_styles_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Output(kept))
    print(f"rank 0 {HOSTILE}")
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    open_console().print(table)
    assert not raw_controls(kept.getvalue())
    assert kept.getvalue().count("reversed") == 4
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    open_console().print("[red]as our own[/red]")
    assert "\x1b[31m" in kept.getvalue()


@pytest.mark.parametrize("number", ["EPIPE", "EIO", "ENOSPC"])
@pytest.mark.parametrize("told", ["", "training goes on"])
def test_a_lost_stream_raises_nothing_and_is_told_where_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, number: str, told: str
) -> None:
    import errno

    code = getattr(errno, number)
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Output(Failing(code)))
    monkeypatch.setattr(sys, "stderr", errors)
    output.go_on_without(told)
    for _ in range(3):
        print("a line", flush=True)
        open_console().print("another")
    expected = f"fastgrpo: standard output: {os.strerror(code)}; {told}\n" if told else ""
    assert errors.getvalue() == expected
    full = number == "ENOSPC" and not told
    assert output.refused() == (os.strerror(code) if full else "")


def test_a_stream_that_was_never_there_and_one_that_was_closed_raise_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        shown = Output(stream)
        assert shown.write("text") == 4 and not shown.isatty()
        shown.flush()


def test_an_alphabet_without_a_letter_gets_its_escape() -> None:
    kept = io.BytesIO()
    shown = Output(io.TextIOWrapper(kept, encoding="ascii", errors="strict"))
    shown.write("红 ü")
    shown.flush()
    assert kept.getvalue() == b"\\u7ea2 \\xfc"
