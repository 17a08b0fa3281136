"""Prompts: the rows of a file that a run uses, its held-out ones, and the order of drawing them."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.algorithm import noise
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Prompt
from fastgrpo.data import prompt_files
from fastgrpo.data.prompt_files import Row

UNUSABLE = "without text or image"  # what is counted where prompts.bad_rows=skip


@dataclass(frozen=True)
class Selected:
    """The prompts of a file that the recipe selects, in order, and rows left out by reason."""

    prompts: list[Prompt]
    left_out: Mapping[str, int]
    first_problem: str | None = None  # of a row that prompts.bad_rows=skip left out


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
    return Split(train, heldout, _summary(train, heldout, left_out, problem))


def read(settings: config.Prompts, path: str, source: str, limit: int | None) -> Selected:
    """The prompts of one file that pass the filters of [prompts], each once.

    At most the first `limit`.
    White space in a text is collapsed.  source: the recipe key that names the file
    Raises UserError, with file and row, for a file without prompts and, unless
    prompts.bad_rows=skip, a bad row.
    """
    chosen: dict[Prompt, None] = {}
    left_out: Counter[str] = Counter()
    first_problem = None
    folder = Path(path).parent
    for row in prompt_files.rows(path, source, _columns(settings)):
        where = f"{source}={path}: {row.place}"
        try:
            prompt = _prompt(settings, row, folder, where)
            reason = _reason(settings, prompt, row)
        except ValueError as error:
            if settings.bad_rows == "error":
                raise UserError(
                    f"{where} {error}; correct it, or set prompts.bad_rows=skip."
                ) from None
            first_problem = first_problem or f"{where} {error}"
            reason = UNUSABLE
        else:
            reason = "repeated" if reason is None and prompt in chosen else reason
            if reason is None:
                chosen[prompt] = None
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
    return Selected(list(chosen), left_out, first_problem)


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
    for number, column in enumerate(settings.nsfw_columns):
        columns[f"prompts.nsfw_columns.{number}"] = column
    return columns


def _prompt(settings: config.Prompts, row: Row, folder: Path, where: str) -> Prompt:
    """A row's prompt. Raises ValueError, which says what is wrong with the row."""
    if row.problem is not None:
        raise ValueError(row.problem)
    value = row.values.get(settings.column)
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"has no text in '{settings.column}'")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"has half a character (a lone surrogate) in '{settings.column}'")
    if settings.image_column is None:
        return Prompt(text, None, where)
    name = row.values.get(settings.image_column)
    if not isinstance(name, str) or not name:
        raise ValueError(f"has no file name in '{settings.image_column}'")
    image = folder / name
    try:
        if not image.stat().st_size or not image.is_file():
            raise ValueError(
                f"names the image {image}, which is {'empty' if image.is_file() else 'no file'}"
            )
    except OSError as error:
        raise ValueError(
            f"names the image {image}, which cannot be read ({error.strerror})"
        ) from None
    return Prompt(text, image, where)


def _reason(settings: config.Prompts, prompt: Prompt, row: Row) -> str | None:
    """Why a filter leaves a prompt out; None: no filter does.

    Raises ValueError where a value cannot be read.
    """
    if len(prompt.text) < settings.min_chars:
        return "too short"
    if settings.max_chars is not None and len(prompt.text) > settings.max_chars:
        return "too long"
    if settings.languages and settings.language_column is not None:
        language = str(row.values.get(settings.language_column) or "").strip().casefold()
        if language not in {wanted.casefold() for wanted in settings.languages}:
            return "in another language"
    for column in settings.nsfw_columns:
        if _unwanted(row.values.get(column), column) > settings.max_nsfw:
            return "unsafe"
    return None


def _unwanted(value: object, column: str) -> float:
    """A cell of an NSFW column as a number from 0 to 1."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = {"true": 1.0, "false": 0.0}.get(str(value).strip().lower(), math.nan)
    if not 0 <= number <= 1 + 1e-6:
        raise ValueError(
            f"has {value!r} in '{column}', which is neither a number from 0 to 1 nor true or false"
        )
    return number


def _check_apart(path: str, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    shared = {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    if shared:
        raise UserError(
            f"prompts.heldout={path}: {len(shared)} prompts are also trained on, such as "
            f"'{min(shared)}'; take them out of one of the files."
        )


def _summary(
    train: Sequence[Prompt],
    heldout: Sequence[Prompt],
    left_out: Mapping[str, int],
    first_problem: str | None,
) -> str:
    line = f"prompts: {len(train):,} to train on, {len(heldout):,} held out"
    if left_out:
        line += f"; {_counts(left_out)}"
    return line + (f" (such as {first_problem})" if first_problem else "")


def _counts(left_out: Mapping[str, int]) -> str:
    return "left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
