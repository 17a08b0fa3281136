"""Scores of files: what any reward says of clips and pictures, before it is trusted with a run.

One clip at a time, so that a file's scores never depend on the files beside it. A file that cannot be read, and a clip
that a reward cannot judge, have no score and say why; where a single file was asked for, it is an error.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.tools.score import clip_files, judges
from fastgrpo.tools.score.judges import Judges, Servers, Verdict

UNREADABLE = "unreadable"  # the kind of what a file cannot be scored for


@dataclass(frozen=True)
class Wanted:
    """What to score, as the command line says it."""

    files: tuple[Path, ...]
    prompt: str | None = None
    prompts: str | None = None
    fps: float | None = None  # none = each file's own
    size: clip_files.Size | None = None  # in which the clips were made; none = as each file's folder or the file says


@dataclass(frozen=True)
class Scored:
    """One file and what was said of it."""

    file: Path
    prompt: str | None
    shape: tuple[int, ...] | None = None  # [F, H, W, 3]; none = unreadable
    fps: float | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # by reward
    problem: str | None = None  # why the file as a whole has no score

    def row(self) -> dict[str, Any]:
        """As JSON: a score that there is not is null, and `invalid` says why."""
        invalid = {name: [one.kind, one.reason] for name, one in self.verdicts.items() if one.kind is not None}
        return {
            "file": str(self.file),
            "prompt": self.prompt,
            "shape": self.shape,
            "fps": self.fps,
            "scores": {
                name: {part: value if math.isfinite(value) else None for part, value in one.scores.items()}
                for name, one in self.verdicts.items()
            },
            "invalid": {name: {"class": kind, "reason": reason} for name, (kind, reason) in invalid.items()}
            | ({"file": {"class": UNREADABLE, "reason": self.problem}} if self.problem else {}),
        }

    def note(self) -> str:
        """Why there are holes in its row, in one line."""
        holes = [f"{name}: {one.kind}: {one.reason}" for name, one in self.verdicts.items() if one.kind is not None]
        return "; ".join([self.problem] if self.problem else holes)


@dataclass(frozen=True)
class Result:
    """All files and what was said of them."""

    specs: Sequence[RewardSpec]
    parts: dict[str, tuple[str, ...]]  # reward -> its parts
    files: list[Scored]

    def mean(self, reward: str, part: str) -> tuple[float, int]:
        """(mean of a part over the clips that have it, NaN of none; how many have it)."""
        found = [one.verdicts[reward].scores[part] for one in self.files if reward in one.verdicts]
        valid = [value for value in found if math.isfinite(value)]
        return (sum(valid) / len(valid) if valid else math.nan), len(valid)

    def to_json(self) -> str:
        means = {
            name: {part: {"mean": _or_null(self.mean(name, part)[0]), "clips": self.mean(name, part)[1]} for part in of}
            for name, of in self.parts.items()
        }
        rewards = [spec.model_dump(mode="json", exclude={"weights", "where", "urls"}) for spec in self.specs]
        content = {"rewards": rewards, "files": [one.row() for one in self.files], "means": means}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def score(wanted: Wanted, specs: Sequence[RewardSpec], servers: Servers) -> Result:
    """Score the files by each reward.

    Raises UserError for a wrong setting, a file without a prompt, and where no file can be read.
    """
    files = clip_files.expand(wanted.files)
    texts = clip_files.captions(files, wanted.prompt, wanted.prompts)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    with judges.opened(specs, servers, device) as opened:
        if opened.read_prompts:
            _check_prompts(files, texts)
        pairs = track(list(zip(files, texts, strict=True)), "scoring", disable=not sys.stderr.isatty(), transient=True)
        scored = [_one(file, text, wanted, opened) for file, text in pairs]
        unread = [one for one in scored if one.shape is None]
        if len(unread) == len(scored):
            more = f" (none of the {len(scored)} files can be scored)" if len(scored) > 1 else ""
            raise UserError(f"{unread[0].problem}{more}")
        return Result(specs, opened.parts, scored)


def _check_prompts(files: Sequence[Path], texts: Sequence[str | None]) -> None:
    """Raise UserError where a clip that can be scored has no prompt."""
    missing = [file for file, text in zip(files, texts, strict=True) if text is None and file.is_file()]
    missing = [file for file in missing if not clip_files.composed(file)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"FILES={missing[0]}{more}: no prompt; give --prompt or --prompts, or write it into "
            f"{missing[0].with_suffix('.txt').name} beside the file."
        )


def _one(file: Path, text: str | None, wanted: Wanted, opened: Judges) -> Scored:
    if clip_files.composed(file):
        return Scored(file, text, problem=f"{file}: shows several clips together; score the clips themselves.")
    try:
        clip = clip_files.read(file, wanted.fps, wanted.size)
    except UserError as error:
        return Scored(file, text, problem=str(error))
    verdicts = opened.score(clip.pixels, text or "", clip.fps)
    return Scored(file, text, tuple(clip.pixels.shape), clip.fps, verdicts)


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def show(result: Result) -> None:
    """The table on standard output: a row per file, a column per part, the means below."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    columns = [(name, part) for name, parts in result.parts.items() for part in parts]
    for name, part in columns:
        table.add_column(f"{name}\n{part}" if len(result.parts) > 1 else part, justify="right")
    notes = any(one.note() for one in result.files)
    if notes:
        table.add_column("why not", overflow="fold")
    for one in result.files:
        values = [one.verdicts[name].scores[part] if name in one.verdicts else math.nan for name, part in columns]
        table.add_row(str(one.file), *map(number, values), *([one.note()] if notes else []))
    if len(result.files) > 1:
        table.add_section()
        means = [result.mean(name, part) for name, part in columns]
        valid = min((count for _, count in means), default=0)
        label = f"mean of {len(result.files)}" if valid == len(result.files) else "mean of the valid"
        table.add_row(label, *(number(mean) for mean, _ in means), *([""] if notes else []))
    console().print(table, highlight=False, markup=False)


def console() -> Console:
    """Standard output; where that is no terminal, as wide as the tables, so that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)


def number(value: float) -> str:
    """A score to read: five digits that count, a dash for none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def check_target(option: str, file: Path | None) -> None:
    """Raise UserError where a file could not be written there: before hours of work, not after."""
    if file is None or str(file) == "-":
        return
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"{option}={file}: cannot be written there; name a file in a folder that exists.")


def write(option: str, file: Path, content: str) -> None:
    """Write a result as a whole, or with "-" print it. Raises UserError where the disk refuses."""
    if str(file) == "-":
        print(content, end="")
        return
    try:
        replace_text(file, content)
    except OSError as error:
        raise UserError(f"{option}={file}: cannot be written ({error.strerror}); choose another file.") from None
