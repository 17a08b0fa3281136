"""A tokenizer of T5's class that knows letters, and the size of the tiny T5s that read them."""

import string
from typing import Any

from transformers import T5TokenizerFast

WIDTH = 32  # of the text that the tiny T5s make
SIZES: dict[str, Any] = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def tokenizer(longest: int) -> T5TokenizerFast:
    """One token per character, a space's mark before each word; at most `longest` tokens with the
    closing one.
    """
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "▁")]
    letters = [
        (letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation
    ]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=longest)
