"""SHA-256 of large files, computed once and remembered with their size and time."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrpo.core.files import read_json_or_none, replace_text, sha256

THREADS = 4  # hashlib lets go of the interpreter


def hashes(files: Sequence[Path], remembered: Path) -> dict[Path, str]:
    """SHA-256 of each file, remembered where its size and time are the same.

    remembered: the JSON file of earlier hashes, which is kept up to date
    """
    known: dict[str, Any] = read_json_or_none(remembered) or {}
    stamps = {file: f"{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files}
    paths = {file: str(file.resolve()) for file in files}
    changed = [file for file in files if not _fits(known.get(paths[file]), stamps[file])]
    with ThreadPoolExecutor(THREADS) as pool:
        for file, digest in zip(changed, pool.map(sha256, changed), strict=True):
            known[paths[file]] = _entry(stamps[file], digest)
    if changed:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        replace_text(remembered, json.dumps(known, indent=1) + "\n")
    return {file: known[paths[file]]["sha256"] for file in files}


def _entry(stamp: str, digest: str) -> dict[str, str]:
    """A remembered hash, with a hash of itself, by which an edited entry shows."""
    check = hashlib.sha256(f"{stamp} {digest}".encode()).hexdigest()
    return {"stamp": stamp, "sha256": digest, "check": check}


def _fits(entry: object, stamp: str) -> bool:
    """Whether a remembered entry is intact and of a file with this stamp."""
    known = entry if isinstance(entry, dict) else {}
    return known.get("stamp") == stamp and known == _entry(stamp, str(known.get("sha256")))
