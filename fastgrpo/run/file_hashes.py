"""SHA-256 of large files, computed once and remembered with their size and time."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrpo.core.files import replace_text, sha256

THREADS = 4  # that hash files: hashlib lets go of the interpreter


def hashes(files: Sequence[Path], remembered: Path) -> dict[Path, str]:
    """SHA-256 of each file, from `remembered` where its size and time are still those.

    remembered: a JSON file, which is kept up to date
    """
    known = _remembered(remembered)
    stamps = {file: f"{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files}
    places = {file: str(file.resolve()) for file in files}
    changed = [file for file in files if known.get(places[file], {}).get("stamp") != stamps[file]]
    with ThreadPoolExecutor(THREADS) as pool:
        for file, digest in zip(changed, pool.map(sha256, changed), strict=True):
            known[places[file]] = {"stamp": stamps[file], "sha256": digest}
    if changed:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        replace_text(remembered, json.dumps(known, indent=1) + "\n")
    return {file: known[places[file]]["sha256"] for file in files}


def _remembered(file: Path) -> dict[str, Any]:
    """Hashes of an earlier start; none where there are none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
