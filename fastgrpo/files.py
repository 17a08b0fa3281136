"""Files read as JSON, replaced as a whole, flushed to the disk, and hashed."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError


def read_json(file: Path, where: str, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file holds none.  where: the recipe key;  remedy: what to do"""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} cannot be read ({error}); {remedy}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {file} is not a JSON object; {remedy}.")
    return content


def replace_text(file: Path, text: str) -> None:
    """Replace a file as a whole: a kill or an OSError, which is raised, leaves the old one or the new one.

    Of several processes that do so at once, on any machine, the last one's is left.
    """
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Of the content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
