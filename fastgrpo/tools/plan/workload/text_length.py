"""Tokens of a recipe's longest prompt, without a tokenizer, which may not be here.

Tokenizers of text encoders make a token of about four bytes of English, of three of Chinese:
three is the cautious number of both.
"""

from functools import lru_cache
from itertools import islice
from pathlib import Path

from fastgrpo.core.config.sections import Prompts

BYTES_PER_TOKEN = 3
CLOSING = 2  # tokens that an encoder keeps beside the prompt's own
MOST_PROMPTS = 1_000_000  # that are read


def longest(prompts: Prompts) -> int | None:
    """Tokens of the longest prompt of a plain text file.  None: of another kind, or not here"""
    return _of_file(Path(prompts.train), prompts.limit or MOST_PROMPTS)


@lru_cache(maxsize=16)  # a search asks ten thousand times
def _of_file(file: Path, most: int) -> int | None:
    if file.suffix.lower() != ".txt" or not file.is_file():
        return None
    try:
        with file.open("rb") as lines:
            prompts = islice((line.strip() for line in lines if line.strip()), most)
            found = max(map(len, prompts), default=0)
    except OSError:
        return None
    return -(-found // BYTES_PER_TOKEN) + CLOSING if found else None
