"""Prompts: the rows of a file that a run uses, its held-out ones, and the order of drawing them."""

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.algorithm import noise
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt, StoredImage
from fastgrpo.data import prompt_files
from fastgrpo.data.prompt_formats import BOM, BOM_TAKEN, Row

UNUSABLE = "without text or image"  # what is counted where prompts.bad_rows=skip
SEVERAL_CAPTIONS = "with several captions, of which the first is used"
SHOWN = 40  # letters of a value in a message
ROW_BYTES = 4096  # of a row that travels to the rewards, so that a request's prompts fit its header


@dataclass(frozen=True)
class Selected:
    """The prompts of a file that the recipe selects, in order, and rows left out by reason."""

    prompts: list[Prompt]
    left_out: Mapping[str, int]
    notes: Mapping[str, int]  # rows that are used, and what is to be told of them
    first_problem: str | None = None  # of a row that prompts.bad_rows=skip left out

    @property
    def remarks(self) -> str:
        """What is to be told after the number of prompts; empty where there is nothing."""
        line = f"; {_counts(self.left_out)}" if self.left_out else ""
        line += f" (such as {self.first_problem})" if self.first_problem else ""
        return line + (f"; rows used: {_counted(self.notes)}" if self.notes else "")


@dataclass(frozen=True)
class Split:
    """A run's prompts. The texts of `heldout` are distinct, and none occurs in `train`."""

    train: list[Prompt]
    heldout: list[Prompt]
    summary: str  # one line: how many, and what was left out


def split(settings: config.Prompts) -> Split:
    """The training and the held-out prompts of a recipe's [prompts] section.

    Raises UserError for what is wrong with the files, for a prompt on both sides and for too few
    prompts.
    """
    selected = read(settings, settings.train, "prompts.train", settings.limit)
    left_out, problem = selected.left_out, selected.first_problem
    notes = Counter(selected.notes)
    if settings.heldout is None:
        train = [
            prompt
            for prompt in selected.prompts
            if not is_heldout(prompt.text, settings.heldout_share)
        ]
        rest = [
            prompt for prompt in selected.prompts if is_heldout(prompt.text, settings.heldout_share)
        ]
    else:
        apart = read(settings, settings.heldout, "prompts.heldout", None)
        train, rest = selected.prompts, apart.prompts
        left_out, problem = (
            Counter(left_out) + Counter(apart.left_out),
            problem or apart.first_problem,
        )
        notes += Counter(apart.notes)
        _check_apart(settings.heldout, train, rest)
    first: dict[str, Prompt] = {}
    for prompt in rest:
        first.setdefault(prompt.text, prompt)
    heldout = list(first.values())
    if len(heldout) < len(rest):
        left_out = Counter(left_out) + Counter(
            {"held out for another image": len(rest) - len(heldout)}
        )
    check_counts(settings, train, heldout)
    summary = f"prompts: {len(train):,} to train on, {len(heldout):,} held out"
    return Split(train, heldout, summary + Selected([], left_out, notes, problem).remarks)


def few_heldout(settings: config.Recipe, split: Split) -> str | None:
    """What to tell where fewer prompts are held out than are to be evaluated; None: enough are."""
    wanted, there = settings.evaluate.prompts, len(split.heldout)
    if there >= wanted:
        return None
    remedy = f"raise prompts.heldout_share ({settings.prompts.heldout_share:g}) for more"
    if settings.prompts.heldout is not None:
        remedy = "add some to prompts.heldout for more"
    return (
        f"evaluate.prompts={wanted}: only {there} prompts are held out, and all of them will be "
        f"evaluated; {remedy}."
    )


def read(settings: config.Prompts, path: str, source: str, limit: int | None) -> Selected:
    """The prompts of one file that pass the filters of [prompts], each once.

    At most the first `limit`.
    White space in a text is collapsed.  source: the recipe key that names the file
    Raises UserError, with file and row, for a file without prompts and, unless
    prompts.bad_rows=skip, a bad row.
    """
    chosen: dict[Prompt, Mapping[str, object]] = {}
    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    first_problem = None
    for row in prompt_files.rows(path, source, _columns(settings)):
        where = f"{source}={path}: {row.place}"
        try:
            prompt, told = _prompt(settings, row, where)
            reason = _reason(settings, prompt, row)
            if reason is None and chosen.get(prompt, prompt.row) != prompt.row:
                raise ValueError("repeats a prompt with other values for the rewards")
        except ValueError as error:
            if settings.bad_rows == "error":
                other = _other_column(settings, row)
                raise UserError(
                    f"{where} {error}; {other}correct it, or set prompts.bad_rows=skip."
                ) from None
            first_problem = first_problem or f"{where} {error}"
            reason = UNUSABLE
        else:
            reason = "repeated" if reason is None and prompt in chosen else reason
            if reason is None:
                chosen[prompt] = prompt.row
                notes.update(told)
                if len(chosen) == limit:
                    break
        if reason is not None:
            left_out[reason] += 1
    if not chosen and left_out:
        why = f" ({first_problem})" if first_problem else ""
        raise UserError(
            f"{source}={path}: no prompt is left; {_counts(left_out)}{why}; loosen the filters of "
            "[prompts]."
        )
    if not chosen:
        raise UserError(f"{source}={path}: the file has no prompts; write one per line or row.")
    _check_reward_columns(settings, chosen.values(), f"{source}={path}", row)
    return Selected(list(chosen), left_out, notes, first_problem)


def is_heldout(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out share, by its hash alone, whatever its case."""
    digest = hashlib.sha256(text.casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_counts(
    settings: config.Prompts, train: Sequence[Prompt], heldout: Sequence[Prompt]
) -> None:
    """Raise UserError where a side is empty or an iteration needs more prompts than there are."""
    if not heldout or not train:
        side, change = ("held-out", "raise") if not heldout else ("training", "lower")
        remedy = (
            "correct the file"
            if settings.heldout
            else f"{change} it, or name a file in prompts.heldout"
        )
        key = "prompts.heldout" if settings.heldout else "prompts.heldout_share"
        raise UserError(
            f"{key}={settings.heldout or settings.heldout_share}: no {side} prompt is left of "
            f"{len(train) + len(heldout)}; {remedy}."
        )
    if settings.per_iteration > len(train):
        raise UserError(
            f"prompts.per_iteration={settings.per_iteration}: there are {len(train)} training "
            "prompts; use at most that many."
        )


def draw(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of the prompts of an iteration: each epoch is a keyed permutation of all `count`."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(iteration * per_iteration, (iteration + 1) * per_iteration):
        epoch, offset = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = noise.permutation(count, ("prompt order", seed, epoch))
        chosen.append(orders[epoch][offset])
    return chosen


def _columns(settings: config.Prompts) -> dict[str, str]:
    """Recipe key -> the column that the key names."""
    columns = {"prompts.column": settings.column}
    if settings.image_column is not None:
        columns["prompts.image_column"] = settings.image_column
    if settings.languages:
        if settings.language_column is None:
            raise UserError(
                "prompts.languages: no column to compare with; set prompts.language_column, too."
            )
        columns["prompts.language_column"] = settings.language_column
    for name in ("nsfw_columns", "reward_columns"):
        for number, column in enumerate(getattr(settings, name)):
            columns[f"prompts.{name}.{number}"] = column
    return columns


def _prompt(settings: config.Prompts, row: Row, where: str) -> tuple[Prompt, list[str]]:
    """(a row's prompt, what is to be told of the row).

    Raises ValueError, which says what is wrong with the row.
    """
    if row.problem is not None:
        raise ValueError(row.problem)
    text, notes = text_of(row, settings.column)
    column = settings.image_column
    image = None if column is None else _image(column, row)
    return Prompt(text, image, where, _for_rewards(settings, row, image)), notes


def _for_rewards(
    settings: config.Prompts, row: Row, image: Path | StoredImage | None
) -> dict[str, object]:
    """What travels to the rewards beside the text; of the reference image's column its file.

    A column that this row lacks is left out. Raises ValueError for what JSON cannot hold, and for
    more than a request has room for.
    """
    values = {column: row.value(column) for column in settings.reward_columns}
    if settings.image_column in values and isinstance(image, Path):
        values[settings.image_column] = str(image.absolute())
    values = {column: value for column, value in values.items() if value is not None}
    for column, value in values.items():
        try:
            size = len(json.dumps(value, allow_nan=False).encode())
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"has no text, number or list in '{column}' for the rewards") from None
        if size > ROW_BYTES:
            raise ValueError(
                f"has {size:,} bytes in '{column}', above {ROW_BYTES:,} for the rewards"
            )
    return values


def _check_reward_columns(
    settings: config.Prompts, rows: Iterable[Mapping[str, object]], where: str, last: Row
) -> None:
    """Raise UserError for a column that no row has.  rows: as they travel;  last: as it is read"""
    there = {column for row in rows for column in row}
    missing = [column for column in settings.reward_columns if column not in there]
    if missing:
        raise UserError(
            f"prompts.reward_columns={missing[0]}: no row of {where} has it; they have "
            f"{_short(', '.join(last.values), 200)}."
        )


def text_of(row: Row, column: str) -> tuple[str, list[str]]:
    """(the text of a row, its white space collapsed; what is to be told of the row).

    Raises ValueError where the row has no text, or text that no encoder should see.
    """
    value, notes = row.value(column), list(row.notes)
    if isinstance(value, list):
        texts = [text for text in value if isinstance(text, str) and text.strip()]
        value = texts[0] if texts else None
        notes += [SEVERAL_CAPTIONS] if len(texts) > 1 else []
    if isinstance(value, str) and BOM in value:
        value = value.replace(BOM, "")
        notes = list(dict.fromkeys([*notes, BOM_TAKEN]))
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"has no text in '{column}'")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"has half a character (a lone surrogate) in '{column}'")
    control = next((letter for letter in text if letter < " " or letter == "\x7f"), None)
    if control is not None:
        raise ValueError(f"has the control character U+{ord(control):04X} in '{column}'")
    if not text.isascii() and all(unicodedata.category(letter)[0] in "CZ" for letter in text):
        raise ValueError(f"has no visible letter in '{column}'")
    return text, notes


def _image(column: str, row: Row) -> Path | StoredImage:
    """The reference image of a row: a file, or one that the row itself holds.

    Raises ValueError where it has none.
    """
    value = row.value(column)
    if isinstance(
        value, Mapping
    ):  # as Hugging Face's datasets have it: {"bytes": ..., "path": ...}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return StoredImage(row.file, column, row.number)
    if not isinstance(value, str) or not value:
        raise ValueError(f"has no file name in '{column}'")
    image = row.file.parent / value
    try:
        if not image.stat().st_size or not image.is_file():
            raise ValueError(
                f"names the image {image}, which is {'empty' if image.is_file() else 'no file'}"
            )
    except OSError as error:
        raise ValueError(
            f"names the image {image}, which cannot be read ({error.strerror})"
        ) from None
    return image


def _other_column(settings: config.Prompts, row: Row) -> str:
    """What to do where a JSON row has other columns than one that is asked for."""
    if row.problem is not None or not row.values:
        return ""
    asked = {key: one for key, one in _columns(settings).items() if "reward_columns" not in key}
    lacking = [key for key, column in asked.items() if row.value(column) is None]
    names = [name for name, value in row.values.items() if value is not None]
    if not lacking or not names:
        return ""
    return f"it has {_short(', '.join(names), 200)}: name one in {lacking[0]}, "


def _short(text: str, longest: int = SHOWN) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def _reason(settings: config.Prompts, prompt: Prompt, row: Row) -> str | None:
    """Why a filter leaves a prompt out; None: no filter does.

    Raises ValueError where a value cannot be read.
    """
    if len(prompt.text) < settings.min_chars:
        return "too short"
    if settings.max_chars is not None and len(prompt.text) > settings.max_chars:
        return "too long"
    if settings.languages and settings.language_column is not None:
        language = str(row.value(settings.language_column) or "").strip().casefold()
        if language not in {wanted.casefold() for wanted in settings.languages}:
            return "in another language"
    for column in settings.nsfw_columns:
        if _unwanted(row.value(column), column) > settings.max_nsfw:
            return "unsafe"
    return None


def _unwanted(value: object, column: str) -> float:
    """A cell of an NSFW column as a number from 0 to 1."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except OverflowError:
        number = math.inf
    except ValueError:
        number = {"true": 1.0, "false": 0.0}.get(str(value).strip().lower(), math.nan)
    if not 0 <= number <= 1 + 1e-6:
        raise ValueError(
            f"has {_short(repr(value))} in '{column}', which is neither a number from 0 to 1 nor true or false"
        )
    return number


def _check_apart(path: str, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    """Raise UserError for a prompt on both sides, also where it differs in case alone."""
    trained = {prompt.text.casefold() for prompt in train}
    shared = {prompt.text for prompt in heldout if prompt.text.casefold() in trained}
    if shared:
        raise UserError(
            f"prompts.heldout={path}: {len(shared)} prompts are also trained on, such as "
            f"'{min(shared)}'; take them out of one of the files."
        )


def _counts(left_out: Mapping[str, int]) -> str:
    return f"left out: {_counted(left_out)}"


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in numbers.items())
