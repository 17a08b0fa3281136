"""SHA-256 of large files, computed once and remembered with their size and time."""

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
    changed = [file for file in files if known.get(paths[file], {}).get("stamp") != stamps[file]]
    with ThreadPoolExecutor(THREADS) as pool:
        for file, digest in zip(changed, pool.map(sha256, changed), strict=True):
            known[paths[file]] = {"stamp": stamps[file], "sha256": digest}
    if changed:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        replace_text(remembered, json.dumps(known, indent=1) + "\n")
    return {file: known[paths[file]]["sha256"] for file in files}
