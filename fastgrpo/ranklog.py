"""A file per rank below the run's folder, logs/rank-N.jsonl: one line of JSON for each iteration that it went through.

Unlike metrics.jsonl it is only ever appended to: an iteration that a resumed run repeats is there twice.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

TAIL = 16384  # bytes, more than a line has


class RankLog:
    """What one rank appends to, once per iteration; an OSError ends nothing and is told once, on stderr."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.file = run_dir / "logs" / f"rank-{rank}.jsonl"
        self.failed = False

    def append(self, row: Mapping[str, object]) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as lines:
                begun = lines.tell() > 0 and not _tail(self.file).endswith(b"\n")  # cut off by a kill
                lines.write((b"\n" if begun else b"") + json.dumps(row).encode() + b"\n")
        except OSError as error:
            if not self.failed:
                print(f"fastgrpo: {self.file}: {error.strerror}; training goes on without that log", file=sys.stderr)
            self.failed = True


def hosts_of(run_dir: Path) -> dict[int, str]:
    """The node of each rank that has a log, as its last line says."""
    found = {}
    for file in (run_dir / "logs").glob("rank-*.jsonl"):
        try:
            row = json.loads(_tail(file).splitlines()[-1])
            found[int(row["rank"])] = str(row["host"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # empty, or cut off by a kill
    return found


def _tail(file: Path) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, content.seek(0, 2) - TAIL))
        return content.read()
