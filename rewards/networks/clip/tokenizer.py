"""Prompts to CLIP's token ids, by the rules of open_clip or of transformers.

The two clean text differently. CLIP's vocabulary follows from its merges (Radford et al. 2021): the
256 bytes, the 256 bytes at a word's end, one entry per merge, start of text, end of text. So the
merges alone are read, from any file that they are published in.

Departure from both references: text is never read as a special token, so a prompt that contains one
changes nothing but itself.
"""

import gzip
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.common import weight_files

FILES = ("merges.txt", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz")
PUBLIC = "openai/clip-vit-large-patch14"
"""The hub repository of the merges where the weights' folder has none: every CLIP has the same."""

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Merge = tuple[str, str]


def clean_open_clip(text: str) -> str:
    """Text as open_clip cleans it: ftfy's repair, HTML entities, single spaces, lower case.

    The repair also straightens quotes.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def clean_transformers(text: str) -> str:
    """Text as transformers' CLIPTokenizer cleans it: NFC, single spaces, lower case."""
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    return normalizers.Sequence(steps).normalize_str(text)


class ClipTokenizer:
    """Tokenizer of texts to ids of a fixed length."""

    def __init__(self, merges: Sequence[Merge], context: int, clean: Callable[[str], str]) -> None:
        """Build the vocabulary of the merges.

        context: tokens per text, start and end included;  clean: applied to every text first
        """
        vocabulary = _vocabulary(merges)
        self.start, self.end = len(vocabulary), len(vocabulary) + 1
        self.context = context
        self.clean = clean
        self.words = Tokenizer(models.BPE(vocabulary, list(merges), end_of_word_suffix="</w>"))
        self.words.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids, int64 [B, context]: start, the text, end, zeros.

        A text that is too long loses its tail.
        """
        ids = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = self.words.encode(self.clean(text)).ids[: self.context - 2]
            row[: len(words) + 2] = torch.tensor([self.start, *words, self.end])
        return ids


def _vocabulary(merges: Sequence[Merge]) -> dict[str, int]:
    """Ids of the pieces, without the two special tokens.

    Bytes are written as printable characters, by GPT-2's table.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    symbols = [chr(byte) for byte in printable] + [
        chr(256 + n) for n in range(256 - len(printable))
    ]
    pieces = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(merge) for merge in merges),
    ]
    return {piece: number for number, piece in enumerate(pieces)}


def find(option: str | None, weights_file: Path) -> Path:
    """The file of the merges.

    option: rewards.options.tokenizer. None: the file beside the weights, else the public one
    """
    beside = [
        weights_file.parent / name for name in FILES if (weights_file.parent / name).is_file()
    ]
    if option is None and beside:
        return beside[0]
    return weight_files.locate(
        option or PUBLIC,
        FILES,
        beside=(),
        where="rewards.options.tokenizer",
        remedy=f"give a folder with CLIP's {' or '.join(FILES)}",
    )


def read_merges(file: Path, vocabulary_size: int) -> list[Merge]:
    """The merges of CLIP's vocabulary of this size, in order.

    Raises UserError where the file has not that many.
    """
    wanted = vocabulary_size - 512 - 2
    try:
        if file.suffix == ".json":
            lines = _of_tokenizer_json(json.loads(file.read_text(encoding="utf-8")))
        else:
            raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            lines = raw.decode("utf-8").split("\n")[1:]  # the first line says the version
        merges = [
            (first, second) for first, second in (line.split() for line in lines[:wanted] if line)
        ]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"rewards.options.tokenizer={file}: cannot be read ({error}); download it again."
        ) from None
    if len(merges) != wanted:
        raise UserError(
            f"rewards.options.tokenizer={file}: has {len(merges)} merges where the weights' "
            f"vocabulary of {vocabulary_size} needs {wanted}; give the tokenizer of these weights."
        )
    return merges


def _of_tokenizer_json(content: dict[str, Any]) -> list[str]:
    merges = content["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
