"""Prompt files as rows: text with a prompt per line, JSONL, CSV and Parquet with named columns.

Files are read as a stream and only as far as the caller goes on, so that one of millions of rows
may be given.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.core.errors import UserError

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
PARQUET_BATCH = 4096  # rows decoded at a time


@dataclass(frozen=True)
class Row:
    """A row: its position, such as "line 12", its values by column, its problem as a whole."""

    place: str
    values: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None


def rows(path: str, source: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a prompt file, from its first on.

    source: the recipe key that names the file;
    columns: recipe key -> the column it asks for; of a text file, whose
    only column is the line, `prompts.column` names that column and no other key may be there
    Raises UserError for a file that cannot be read, of another kind, or (CSV, Parquet) without one
    of the columns; in JSONL each row has its own keys, and what a row lacks is missing in its
    values.
    """
    kind = Path(path).suffix.lower()
    readers = {".txt": _text, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if kind not in readers:
        raise UserError(f"{source}={path}: of an unknown kind; give one of {', '.join(KINDS)}.")
    try:
        yield from readers[kind](Path(path), columns)
    except OSError as error:
        problem = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else (error.strerror or str(error))
        )
        raise UserError(
            f"{source}={path}: {problem}; give a prompt file ({', '.join(KINDS)})."
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{source}={path}: line {_first_bad_line(Path(path))} is not UTF-8; convert the file, "
            "e.g. iconv -f latin1 -t utf-8."
        ) from None


def _text(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    for key, column in columns.items():
        if key != "prompts.column":
            raise UserError(
                f"{key}={column}: {path} is plain text and has no columns; give its rows as "
                ".jsonl, .csv or .parquet."
            )
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"line {number}", {columns["prompts.column"]: line})


def _jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            position = f"line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                yield Row(position, problem="is not JSON")
                continue
            if isinstance(values, dict):
                yield Row(position, values)
            else:
                yield Row(position, problem="is not a JSON object")


def _csv(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        start = 1
        try:
            if reader.fieldnames is None:
                return  # an empty file
            _check_columns(path, columns, list(reader.fieldnames))
            start = reader.line_num + 1
            for values in reader:
                # a quoted value may span lines: a row is named by its first one
                problem = "has more cells than the header" if None in values else None
                yield Row(f"line {start}", values, problem)
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}: line {start} is not CSV ({error}); correct its quotes."
            ) from None


def _parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; pip install 'fastgrpo[data]', or give the "
            "rows as .jsonl or .csv."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(
                batch_size=PARQUET_BATCH, columns=sorted(set(columns.values()))
            ):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a Parquet file that can be read ({problem}); download it again."
        ) from None


def _check_columns(path: Path, columns: Mapping[str, str], present: list[Any]) -> None:
    for key, column in columns.items():
        if column not in present:
            raise UserError(
                f"{key}={column}: no such column in {path}; it has {', '.join(map(str, present))}."
            )


def _first_bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} was changed while it was read")
