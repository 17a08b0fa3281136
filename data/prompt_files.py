"""Prompt files as rows, whatever their kind: one file, a compressed one, a folder or pattern of
shards, or a folder of captioned pictures.

Files are read as a stream and only as far as the caller goes on, so that one of millions of rows
may be given.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import refuse_lfs_pointer, sha256
from fastgrpo.data import prompt_formats
from fastgrpo.data.prompt_formats import Row

READERS = {
    ".txt": prompt_formats.text,
    ".jsonl": prompt_formats.json_lines,
    ".json": prompt_formats.json_array,
    ".csv": prompt_formats.csv_rows,
    ".tsv": prompt_formats.csv_rows,
    ".parquet": prompt_formats.parquet,
}
KINDS = tuple(READERS)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".mp4", ".webm", ".mov", ".avi")
"""What a folder of captioned pictures or videos has beside its .txt files."""
HEAD = 4096  # bytes looked at to tell text from what is none


def rows(path: str, source: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a prompt file, or of the shards that a folder or a pattern holds, from the first.

    source: the recipe key that names the file;
    columns: recipe key -> the column it asks for, "caption.text" for a value inside another; of a
    text file, whose only column is the line, `prompts.column` names that column and no other key
    may be there
    Raises UserError for a file that cannot be read, of another kind, or (CSV, Parquet) without one
    of the columns; in JSON each row has its own keys, and what a row lacks is missing in its
    values.
    """
    if pictures := _pictures(path):
        yield from (prompt_formats.captioned(picture, columns) for picture in pictures)
        return
    files = _shards(path, source)
    for file in files:
        for row in _rows_of(file, source, columns):
            place = f"{file.name}, {row.place}" if len(files) > 1 else row.place
            yield replace(row, place=place, file=file)


def content_hash(path: str, source: str) -> str:
    """SHA-256 of the files that a recipe's value names: of one, of its content; of several, of
    their names and contents. Of captioned pictures the captions' contents count.
    """
    pictures = _pictures(path)
    captions = [picture.with_suffix(".txt") for picture in pictures]
    files = _shards(path, source) if not pictures else [one for one in captions if one.is_file()]
    if files == [Path(path)]:
        return sha256(files[0])
    lines = [f"{file.name} {sha256(file)}\n" for file in files]
    lines += [f"{picture.name}\n" for picture in pictures]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _pictures(path: str) -> list[Path]:
    """The pictures and videos of a folder of captioned ones, by their names."""
    given = Path(path)
    if not given.is_dir():
        return []
    return [file for file in sorted(given.iterdir()) if file.suffix.lower() in PICTURES]


def _shards(path: str, source: str) -> list[Path]:
    """The files that a recipe's value names, in the order of their names."""
    given = Path(path)
    if given.is_dir():
        found = [file for file in sorted(given.iterdir()) if _kind(file) in READERS]
    elif has_magic(path) and not given.exists():
        found = [Path(name) for name in sorted(glob(path, recursive=True))]
    else:
        return [given]
    if not found:
        raise UserError(
            f"{source}={path}: no file there is of a known kind; give one of {', '.join(KINDS)}."
        )
    kinds = sorted({_kind(file) for file in found})
    if len(kinds) > 1:
        raise UserError(
            f"{source}={path}: holds files of several kinds ({', '.join(kinds)}); name those that "
            f"are meant, e.g. {given / '*' if given.is_dir() else '*'}{kinds[0]}."
        )
    return found


def _kind(file: Path) -> str:
    """The suffix that says what a file holds: of x.jsonl.gz it is .jsonl."""
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def _rows_of(file: Path, source: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of one file. Raises UserError, which names it."""
    kind = _kind(file)
    if kind not in READERS:
        raise UserError(
            f"{source}={file}: of an unknown kind; give one of {', '.join(KINDS)}, or one of the "
            "first five with .gz."
        )
    try:
        _check_content(file, source, kind)
        yield from READERS[kind](file, columns)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{source}={file}: damaged ({error}); download it again.") from None
    except OSError as error:
        problem = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else (error.strerror or str(error))
        )
        raise UserError(
            f"{source}={file}: {problem}; give a prompt file ({', '.join(KINDS)})."
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{source}={file}: line {prompt_formats.first_bad_line(file)} is not UTF-8; convert "
            "the file, e.g. iconv -f latin1 -t utf-8."
        ) from None


def _check_content(file: Path, source: str, kind: str) -> None:
    """Raise UserError for a pointer of git-lfs in a file's place, and for UTF-16."""
    refuse_lfs_pointer(file, f"{source}={file}")
    if kind == ".parquet":
        return
    with prompt_formats.opened_bytes(file) as stream:
        head = stream.read(HEAD)
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # every other byte of Latin letters; a single zero is its row's problem
    if marked or head.count(0) > len(head) // 4:
        order = "be" if head.startswith((b"\xfe\xff", b"\0")) else "le"
        raise UserError(
            f"{source}={file}: is UTF-16 and not UTF-8; convert the file, e.g. iconv -f utf-16"
            f"{order} -t utf-8."
        )
