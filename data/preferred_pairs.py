"""A file of preferred pairs: for a prompt a clip or picture that people prefer to another.

Rows of .jsonl, .json, .csv, .tsv or .parquet with the columns prompt, chosen and rejected, the last
two names of files, from the folder of the pairs' file. Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.data import prompt_files
from fastgrpo.data.prompt_formats import Row

KEY = "objective.dpo_pairs"
COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class PreferredPair:
    """Two files of one prompt."""

    chosen: Path
    rejected: Path


def read(path: str) -> dict[str, list[PreferredPair]]:
    """The pairs by their prompt, whose white space is collapsed as that of prompts is.

    Raises UserError, with the file and the row, for one without a text or a file, and for no rows.
    """
    pairs: dict[str, list[PreferredPair]] = {}
    for row in prompt_files.rows(path, KEY, {f"{KEY} ({name})": name for name in COLUMNS}):
        text = row.value("prompt")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{KEY}={path}: {row.place} has no text in 'prompt'; correct it.")
        chosen, rejected = (_file(path, row, column) for column in COLUMNS[1:])
        pairs.setdefault(" ".join(text.split()), []).append(PreferredPair(chosen, rejected))
    if not pairs:
        raise UserError(f"{KEY}={path}: has no pairs; give rows of {', '.join(COLUMNS)}.")
    return pairs


def _file(path: str, row: Row, column: str) -> Path:
    """The file that a row names."""
    name = row.value(column)
    if not isinstance(name, str) or not name:
        raise UserError(f"{KEY}={path}: {row.place} has no file name in '{column}'; correct it.")
    file = row.file.parent / name
    if not file.is_file():
        raise UserError(f"{KEY}={path}: {row.place} names {file}, which is no file; correct it.")
    return file
