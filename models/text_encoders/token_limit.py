"""How much of a text an encoder sees."""

from typing import Any


def cut(tokenizer: Any, text: str, longest: int) -> tuple[int, int] | None:
    """(tokens that the encoder sees, tokens of the text); None where it sees the whole text.

    longest: tokens of a text, with the marks at its ends, that the encoder takes
    """
    count = len(tokenizer(text, truncation=False, padding=False, verbose=False).input_ids)
    return (longest, count) if count > longest else None
