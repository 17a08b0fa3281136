"""What VideoAlign reads: the prompt template around a user's text, as token ids.

The template belongs to the official repository (github.com/KwaiVGI/VideoAlign, MIT) and is not
shipped: the user names that repository's prompt_template.py, which is parsed and never executed, or
a text file. Its three special tokens are where the scores are read, so each must stand exactly once
in the whole text. Therefore a user's text is never searched for special tokens, which departs from
the reference: there a prompt that contains one shifts or breaks the scores.
"""

import ast
import hashlib
import re
import string
from pathlib import Path

from tokenizers import Tokenizer

from fastgrpo.core.errors import UserError

MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
VIDEO = "<|video_pad|>"
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


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its name."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).splitlines()[0]


def read_template(file: Path) -> str:
    """The template in prompt_template.py, or the whole text of another file.

    Raises UserError where there is none.
    """
    where = f"rewards.options.template={file}"
    try:
        text = file.read_bytes().decode("utf-8")
        if file.suffix != ".py":
            return text
        body = ast.parse(text).body
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{where}: cannot be read ({_reason(error)}); name prompt_template.py of "
            "https://github.com/KwaiVGI/VideoAlign, which is read and not run."
        ) from None
    for node in body:
        names = [
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)
        ]
        if (
            isinstance(node, ast.Assign)
            and TEMPLATE_NAME in names
            and isinstance(node.value, ast.Constant)
        ):
            return str(node.value.value)
    raise UserError(
        f"{where}: sets no text {TEMPLATE_NAME}; name the official repository's prompt_template.py."
    )


def check_template(template: str, accepted: str | None, file: Path) -> str:
    """The template's SHA-256: that of the official one, or the one that the recipe accepts.

    Raises UserError for another template.
    """
    digest = hashlib.sha256(template.encode()).hexdigest()
    if digest != (accepted or TEMPLATE_SHA256).lower():
        raise UserError(
            f"rewards.options.template={file}: its SHA-256 is {digest}, not "
            f"{accepted or TEMPLATE_SHA256}; name the official prompt_template.py, or accept this "
            "text with rewards.options.template_sha256."
        )
    return digest


class Reader:
    """Reader of a clip's size and a user's text, as token ids."""

    def __init__(self, tokenizer_file: Path, template: str, video_id: int, rows: int) -> None:
        """Tokenize the template around the user's text.

        video_id: the network's token of a piece of video;  rows: of the network's embedding
        Raises UserError where tokenizer, template and network do not belong together.
        """
        self._tokenizer = _tokenizer(tokenizer_file)
        self.video_id = self._id(VIDEO)
        self.filler_id = self._id(FILLER)
        self.mark_ids = tuple(self._id(mark) for mark in MARKS)
        if self.video_id != video_id or max(self.mark_ids) >= rows:
            raise UserError(
                f"rewards.options.base: {tokenizer_file} gives {VIDEO} the id {self.video_id} and "
                f"{MARKS[-1]} {self.mark_ids[-1]}, where the network has {video_id} and {rows} "
                "rows; name Qwen2-VL-2B-Instruct's."
            )
        before, after = _halves(template)
        self._start = self._ids(BEFORE)
        self._vision = (self._id("<|vision_start|>"), self._id("<|vision_end|>"))
        self._head = self._ids(before[:-1])
        self._around = (before[-1], after[0])
        self._tail = self._ids([*after[1:], *AFTER])

    def __call__(self, text: str, video_tokens: int) -> list[int]:
        """Token ids of the whole text.

        Raises ValueError where a special token does not stand exactly where it should.
        The user's text is encoded together with the template's text around it, because a word's
        token includes the space before it.
        """
        if not _encodable(text):
            raise ValueError("prompt: has half of a surrogate pair, which is no character")
        user = self._plain(self._around[0] + text + self._around[1])
        video = [self._vision[0], *[self.video_id] * video_tokens, self._vision[1]]
        ids = [*self._start, *video, *self._head, *user, *self._tail]
        if [i for i in ids if i in self.mark_ids] != list(self.mark_ids) or ids.count(
            self.video_id
        ) != video_tokens:
            raise ValueError(
                "prompt: special tokens are not where they should be; the tokenizer is not "
                "Qwen2-VL's"
            )
        return ids

    def _ids(self, pieces: list[str] | tuple[str, ...]) -> list[int]:
        special = (*MARKS, "<|im_start|>", "<|im_end|>")
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


def _tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json with the three marks, which takes all text literally."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        problem = str(error).splitlines()[0]
        raise UserError(
            f"rewards.options.base: {file} is no tokenizer ({problem}); download it again."
        ) from None
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _halves(template: str) -> tuple[list[str], list[str]]:
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
    before, after = (re.split(f"({'|'.join(map(re.escape, MARKS))})", text) for text in texts)
    if tuple(piece for piece in before + after if piece in MARKS) != MARKS:
        raise UserError(
            f"rewards.options.template: must contain {', '.join(MARKS)}, each once and in this "
            "order."
        )
    return before, after
