"""What a judge reads: its template around a user's text and what it sees, as token ids.

The template's special tokens are where the scores are read, so each must stand exactly once in the
whole text. Therefore a user's text is never searched for special tokens, which departs from the
references: there a prompt that contains one shifts or breaks the scores.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fastgrpo.core.errors import UserError

FILLER = "<|endoftext|>"
BEFORE = (
    "<|im_start|>",
    "system\nYou are a helpful assistant.",
    "<|im_end|>",
    "\n",
    "<|im_start|>",
    "user\n",
)
AFTER = ("<|im_end|>", "\n", "<|im_start|>", "assistant\n")
"""The chat form of Qwen2-VL: a system prompt, one user's turn, the start of the answer."""


@dataclass(frozen=True)
class Form:
    """The special tokens of a judge's text."""

    marks: tuple[str, ...]  # where scores are read, in the template's order
    seen: str  # <|video_pad|> or <|image_pad|>
    model: str  # whose tokenizer it is, for messages


class Reader:
    """Reader of what is seen and a user's text, as token ids."""

    def __init__(
        self, tokenizer_file: Path, template: str, form: Form, seen_id: int, rows: int
    ) -> None:
        """Tokenize the template around the user's text.

        seen_id: the network's token of a piece of what is seen;  rows: of the network's embedding
        Raises UserError where tokenizer, template and network do not belong together.
        """
        self._form = form
        self._tokenizer = _tokenizer(tokenizer_file, form.marks)
        self.seen_id = self._id(form.seen)
        self.filler_id = self._id(FILLER)
        self.mark_ids = tuple(self._id(mark) for mark in form.marks)
        if self.seen_id != seen_id or max(self.mark_ids) >= rows:
            raise UserError(
                f"rewards.options.base: {tokenizer_file} gives {form.seen} the id {self.seen_id} "
                f"and {form.marks[-1]} {self.mark_ids[-1]}, where the network has {seen_id} and "
                f"{rows} rows; name {form.model}'s."
            )
        before, after = _halves(template, form.marks)
        self._start = self._ids(BEFORE)
        self._vision = (self._id("<|vision_start|>"), self._id("<|vision_end|>"))
        self._head = self._ids(before[:-1])
        self._around = (before[-1], after[0])
        self._tail = self._ids([*after[1:], *AFTER])

    def __call__(self, text: str, seen_tokens: int) -> list[int]:
        """Token ids of the whole text.

        Raises ValueError where a special token does not stand exactly where it should.
        The user's text is encoded together with the template's text around it, because a word's
        token includes the space before it.
        """
        if not _encodable(text):
            raise ValueError("prompt: has half of a surrogate pair, which is no character")
        user = self._plain(self._around[0] + text + self._around[1])
        seen = [self._vision[0], *[self.seen_id] * seen_tokens, self._vision[1]]
        ids = [*self._start, *seen, *self._head, *user, *self._tail]
        if [i for i in ids if i in self.mark_ids] != list(self.mark_ids) or ids.count(
            self.seen_id
        ) != seen_tokens:
            raise ValueError(
                "prompt: special tokens are not where they should be; the tokenizer is not "
                "Qwen2-VL's"
            )
        return ids

    def marks(self, ids: Sequence[int]) -> list[int]:
        """Where the special tokens stand in the ids of a text."""
        return [ids.index(mark) for mark in self.mark_ids]

    def _ids(self, pieces: Sequence[str]) -> list[int]:
        special = (*self._form.marks, "<|im_start|>", "<|im_end|>")
        return [
            i
            for piece in pieces
            for i in ([self._id(piece)] if piece in special else self._plain(piece))
        ]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(
                f"rewards.options.base: its tokenizer has no {token}; name a folder of Qwen2-VL."
            )
        return int(number)


def _encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _tokenizer(file: Path, marks: Sequence[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json with the marks, which takes all text literally."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        problem = str(error).splitlines()[0]
        raise UserError(
            f"rewards.options.base: {file} is no tokenizer ({problem}); download it again."
        ) from None
    tokenizer.add_special_tokens(list(marks))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _halves(template: str, marks: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The template before and after the user's text, each split at the marks.

    returns two lists [text, mark, ..., text]
    """
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"rewards.options.template: not a format text ({error}); name the official one."
        ) from None
    names = [(name, form, how) for _, name, form, how in fields if name is not None]
    if names != [("text_prompt", "", None)]:
        raise UserError(
            "rewards.options.template: must contain {text_prompt}, once, and no other field."
        )
    at = next(n for n, field in enumerate(fields) if field[1] is not None)
    texts = ("".join(f[0] for f in fields[: at + 1]), "".join(f[0] for f in fields[at + 1 :]))
    before, after = (re.split(f"({'|'.join(map(re.escape, marks))})", text) for text in texts)
    if tuple(piece for piece in before + after if piece in marks) != marks:
        raise UserError(
            f"rewards.options.template: must contain {', '.join(marks)}, each once and in this "
            "order."
        )
    return before, after
