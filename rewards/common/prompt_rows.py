"""Rows of a file by their prompt: what a reward must know of a prompt beside its text.

A reward is handed pixels and prompts alone, in the trainer's process and behind a server; so a file
that says more is named by an option of it, read where the reward is, and looked up by the prompt.
"""

from collections.abc import Mapping
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.data.prompt_files import rows
from fastgrpo.data.prompts import text_of

KEY = "rewards.options.rows"


def read(path: str, prompt_column: str, *columns: str) -> dict[str, Mapping[str, object]]:
    """Prompt -> its row's values of these columns; of none: all of its values.

    path: a .jsonl, .json, .csv, .tsv or .parquet file;  prompt_column: holds the prompt, which is
    read as a recipe's prompts are
    Raises UserError for a file without rows, a row without one of the values, and a prompt that
    comes again with other values.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{KEY}={path}: no such file; name one that has a row for each prompt.")
    asked = {KEY: prompt_column} | {f"column {name}": name for name in columns}
    found: dict[str, Mapping[str, object]] = {}
    for row in rows(path, KEY, asked):
        where = f"{KEY}={path}: {row.place}"
        if row.problem is not None:
            raise UserError(f"{where} {row.problem}; correct it.")
        try:
            prompt, _ = text_of(row, prompt_column)
        except ValueError as error:
            raise UserError(f"{where} {error}; correct it, or name its column.") from None
        values = {name: row.value(name) for name in columns} or dict(row.values)
        lacking = [name for name in columns if values[name] is None]
        if lacking:
            raise UserError(f"{where} has no '{lacking[0]}'; correct it, or name its column.")
        if found.setdefault(prompt, values) != values:
            raise UserError(f"{where} has a prompt that an earlier row has with other values.")
    if not found:
        raise UserError(f"{KEY}={path}: has no rows; name a file with a row for each prompt.")
    return found
