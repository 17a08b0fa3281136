"""The votes of a study, one JSON line each, as the page saves them: read, and refused in one line.

Nothing is repaired: a vote of another study, of an unknown pair or with sides that the page did not
show, a pair that a rater voted on twice, and a line that is cut off end the reading.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.core.errors import UserError
from fastgrpo.tools.evaluate.study.blinding import Key, Pair, shown
from fastgrpo.tools.evaluate.study.page import NAME_PATTERN

CHOICES = ("left", "right", "tie")


@dataclass(frozen=True)
class Vote:
    """What one rater said of one pair."""

    rater: str
    pair: Pair
    left: str  # the model whose clip was on the left: RUN or AGAINST
    choice: str  # one of CHOICES

    @property
    def outcome(self) -> str:
        """The model that was preferred, or "tie"."""
        if self.choice == "tie":
            return "tie"
        return self.left if self.choice == "left" else self.pair.other(self.left)


def read_votes(folder: Path, key: Key, study: str) -> list[Vote]:
    """The votes in the .jsonl files of a folder. Raises UserError for the first that is wrong."""
    files = sorted(folder.glob("*.jsonl"))
    votes = list[Vote]()
    first = dict[tuple[str, str], str]()
    pairs = {pair.pair: pair for pair in key.pairs}
    for file in files:
        for where, entry in _entries(file):
            if entry.get("study") != study:
                raise UserError(
                    f"{where}: a vote of another study, or the key was changed after it; remove "
                    "the file, or restore the key."
                )
            vote = _vote(where, entry, pairs, study)
            earlier = first.setdefault((vote.rater, vote.pair.pair), where)
            if earlier != where:
                raise UserError(
                    f"{where}: {vote.rater} has voted on this pair before ({earlier}); keep the "
                    "newer file, or give raters names of their own."
                )
            votes.append(vote)
    if not votes:
        raise UserError(f"{folder}: no votes; put the files that raters saved (.jsonl) there.")
    return votes


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a file as JSON, with its place."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); correct that.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file; get the file from its rater again.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise UserError(
                f"{file}:{number}: cut off, or no vote; get the file from its rater again."
            ) from None
        yield f"{file}:{number}", entry


def _vote(where: str, entry: dict[str, Any], pairs: dict[str, Pair], study: str) -> Vote:
    """A line as a vote. Raises UserError where it is none of this study's."""
    rater, name, choice = (str(entry.get(field)) for field in ("rater", "pair", "choice"))
    if not re.fullmatch(NAME_PATTERN, rater):
        raise UserError(f"{where}: rater={rater!r}: not a name that the page takes; correct it.")
    if name not in pairs:
        raise UserError(
            f"{where}: pair={name!r}: unknown in this study; get the file from its rater again."
        )
    if choice not in CHOICES:
        raise UserError(
            f"{where}: choice={choice!r}: must be {', '.join(CHOICES)}; get the file from its "
            "rater again."
        )
    pair = pairs[name]
    left, right = shown(study, rater, pair)
    if (entry.get("left"), entry.get("right")) != (left, right):
        raise UserError(
            f"{where}: not the sides that the page shows to {rater}: the line was edited; get the "
            "file from its rater again."
        )
    return Vote(rater, pair, pair.model(left), choice)


def raters_of(votes: Sequence[Vote]) -> list[str]:
    """The names of all raters, sorted."""
    return sorted({vote.rater for vote in votes})
