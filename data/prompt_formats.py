"""What the kinds of prompt files hold: text with a prompt per line, JSON, CSV and Parquet.

Each reader takes a file and the columns that are asked for, and gives rows from the first on.
"""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import StoredImage

PARQUET_BATCH = 512  # rows decoded at a time
LONGEST_CELL = 1 << 27  # letters of a CSV cell; Python's own limit is 131072
BOM = "\ufeff"
BOM_TAKEN = "with a byte-order mark that was taken off"
SEVERAL_LINES = "spanning several lines of the file"


@dataclass(frozen=True)
class Row:
    """A row: its position, such as "line 12", its values by column, its problem as a whole."""

    place: str
    values: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None
    number: int = 0  # among the rows of its file, from 0
    notes: tuple[str, ...] = ()  # what is counted and told of rows that are used
    file: Path = Path()

    def value(self, column: str) -> object:
        """The value of a column, or with "a.b" the one inside another; None where it lacks."""
        if column in self.values:
            return self.values[column]
        value: object = self.values
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def text(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """A prompt per line; blank lines are no rows."""
    for key, column in columns.items():
        if key != "prompts.column":
            raise UserError(
                f"{key}={column}: {path} is plain text and has no columns; give its rows as "
                ".jsonl, .csv or .parquet."
            )
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"line {number}", {columns["prompts.column"]: line})


def captioned(picture: Path, columns: Mapping[str, str]) -> Row:
    """A picture or video with its caption, the text file of its name beside it.

    Raises UserError where another column than those two is asked for.
    """
    for key, column in columns.items():
        if key not in ("prompts.column", "prompts.image_column"):
            raise UserError(
                f"{key}={column}: {picture.parent} is a folder of captioned pictures and has no "
                "columns; give its rows as .jsonl, .csv or .parquet."
            )
    caption = picture.with_suffix(".txt")
    if not caption.is_file():
        return Row(picture.name, problem=f"has no caption {caption.name} beside it")
    named = {"prompts.column": caption.read_text("utf-8-sig"), "prompts.image_column": picture.name}
    values = {columns[key]: value for key, value in named.items() if key in columns}
    return Row(picture.name, values, file=picture)


def json_lines(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """A JSON object per line."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            notes = (BOM_TAKEN,) if line.startswith(BOM) else ()
            line = line.lstrip(BOM)
            if not line.strip():
                continue
            position = f"line {number}"
            try:
                values = json.loads(line, object_pairs_hook=_Object)
            except (ValueError, RecursionError):
                yield Row(position, problem="is not JSON")
                continue
            yield _json_row(position, values, notes)


def json_array(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """An array of JSON objects, or of texts; a file that does not begin like one has an object per
    line.
    """
    with opened(path) as file:
        start = file.read(1 << 16).lstrip()
        if not start.startswith("["):
            yield from json_lines(path, columns)
            return
        file.seek(0)
        try:
            items = json.load(file, object_pairs_hook=_Object)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not JSON ({error}); correct it.") from None
    for number, values in enumerate(items, 1):
        if isinstance(values, str):  # an array of texts alone
            values = _Object([(columns.get("prompts.column", "prompt"), values)])
        yield _json_row(f"item {number}", values, ())


class _Object(dict[str, object]):
    """A JSON object that knows which keys it was given twice."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(pairs) > len(self) else []
        self.repeated = sorted({name for name in names if names.count(name) > 1})


def _json_row(position: str, values: object, notes: tuple[str, ...]) -> Row:
    if not isinstance(values, _Object):
        return Row(position, problem="is not a JSON object")
    if values.repeated:
        return Row(position, problem=f"has {', '.join(map(repr, values.repeated))} twice")
    return Row(position, values, notes=notes)


def csv_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """A header and rows, divided by commas or, in .tsv, by tabs; a quoted value may span lines."""
    csv.field_size_limit(LONGEST_CELL)
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]
    with opened(path, newline="") as file:
        # strict: a quote that is not closed is an error, not the rest of the file in one cell
        reader = csv.DictReader(file, delimiter="\t" if tabs else ",", strict=True)
        start = 1
        try:
            if reader.fieldnames is None:
                return  # an empty file
            header = list(reader.fieldnames)
            _check_columns(path, columns, header)
            start = reader.line_num + 1
            for values in reader:
                # a quoted value may span lines: a row is named by its first one
                notes = (SEVERAL_LINES,) if reader.line_num > start else ()
                yield Row(f"line {start}", values, _csv_problem(values, header), notes=notes)
                start = reader.line_num + 1
        except csv.Error as error:
            problem = str(error)
            if problem == "unexpected end of data":
                problem = "a quote that opens in this row is never closed"
            raise UserError(
                f"{path}: line {start} is not CSV ({problem}); correct its quotes."
            ) from None


def _csv_problem(values: dict[str, Any], header: list[str]) -> str | None:
    if None in values:
        return "has more cells than the header"
    if [str(value).lstrip(BOM) for value in values.values()] == header:
        return "repeats the header"
    return None


def parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a table; only the columns that are asked for are read."""
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
            names = file.schema_arrow.names
            _check_columns(path, columns, names, nested=True)
            top = sorted({_top(column, names) for column in columns.values()})
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=top):
                for values in batch.to_pylist():
                    yield Row(f"row {number + 1}", values, number=number)
                    number += 1
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a Parquet file that can be read ({problem}); download it again."
        ) from None


def stored_bytes(image: StoredImage) -> bytes:
    """The content of a picture that a Parquet file holds. Raises OSError, ValueError."""
    first, values = _row_group(image.file, image.column, image.row)
    value = values[image.row - first].as_py()
    for part in image.column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes):
        raise ValueError("the row holds no bytes")
    return content


def _row_group(file: Path, column: str, row: int) -> tuple[int, Any]:
    """(the first row of the group of rows that has `row`; the column's values in the group)."""
    group, first = 0, 0
    counts = _rows_of_groups(file)
    while first + counts[group] <= row:
        first += counts[group]
        group += 1
    return first, _column_of_group(file, column, group)


@lru_cache(maxsize=16)
def _rows_of_groups(file: Path) -> tuple[int, ...]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        groups = range(table.metadata.num_row_groups)
        return tuple(table.metadata.row_group(group).num_rows for group in groups)


@lru_cache(maxsize=1)  # pictures are asked for in their order
def _column_of_group(file: Path, column: str, group: int) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        top = _top(column, table.schema_arrow.names)
        return table.read_row_group(group, columns=[top]).column(top)


def _top(column: str, names: list[str]) -> str:
    """The column of a table that holds `column`, which may name a value inside it."""
    return column if column in names else column.split(".")[0]


def _check_columns(
    path: Path, columns: Mapping[str, str], present: list[Any], nested: bool = False
) -> None:
    """Raise UserError for a column that is not there, or there twice."""
    for key, column in columns.items():
        name = _top(column, present) if nested else column
        if name not in present:
            raise UserError(
                f"{key}={column}: no such column in {path}; it has {', '.join(map(str, present))}."
            )
        if present.count(name) > 1:
            raise UserError(
                f"{key}={column}: {path} has {present.count(name)} columns of that name; rename "
                "one of them."
            )


def opened(path: Path, newline: str | None = None) -> IO[str]:
    """A file, compressed or not, as UTF-8 text."""
    if path.suffix.lower() == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8-sig", newline=newline))
    return path.open(encoding="utf-8-sig", newline=newline)


def opened_bytes(path: Path) -> IO[bytes]:
    """A file, compressed or not."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def first_bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with opened_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} was changed while it was read")
