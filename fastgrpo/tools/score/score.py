"""Scores of clips and pictures in files by any reward.

One clip is scored at a time, so that a file's scores never depend on other files. An unreadable
file, and a clip that a reward cannot judge, have a reason in place of a score; for a single file
that is an error.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastgrpo import rewards
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.run.terminal import open_console
from fastgrpo.tools.score import clip_files, judges
from fastgrpo.tools.score.judges import Judges, Servers, Verdict

UNREADABLE = "unreadable"  # the class, in JSON, of a file's own problem


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The files to score and their prompts, from the command line."""

    files: tuple[Path, ...]
    prompt: str | None = None  # of every file
    prompts: str | None = None  # a file of prompts
    fps: float | None = None  # None: each file's own
    size: clip_files.Size | None = None  # the clips' own; None: by each file's folder or the file


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One file with its verdicts."""

    file: Path
    prompt: str | None
    shape: tuple[int, ...] | None = None  # [F, H, W, 3]; None: unreadable
    fps: float | None = None
    decoder: str | None = None  # what read it: decord, PyAV or Pillow
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # by reward
    problem: str | None = None  # why the file as a whole has no score

    def row(self) -> dict[str, Any]:
        """The file as JSON: a missing score is null, and `invalid` has the reason."""
        scores, invalid = {}, {}
        for name, verdict in self.verdicts.items():
            scores[name] = {part: _or_null(value) for part, value in verdict.scores.items()}
            if verdict.kind is not None:
                invalid[name] = {"class": verdict.kind, "reason": verdict.reason}
        if self.problem:
            invalid["file"] = {"class": UNREADABLE, "reason": self.problem}
        return {
            "file": str(self.file),
            "prompt": self.prompt,
            "shape": self.shape,
            "fps": self.fps,
            "decoder": self.decoder,
            "scores": scores,
            "invalid": invalid,
        }

    def note(self) -> str:
        """The reasons of the row's missing scores, in one line."""
        if self.problem:
            return self.problem
        invalid = {name: own for name, own in self.verdicts.items() if own.kind is not None}
        return "; ".join(f"{name}: {own.kind}: {own.reason}" for name, own in invalid.items())


@dataclass(frozen=True)
class Result:
    """All files with their verdicts."""

    specs: Sequence[RewardSpec]
    parts: dict[str, tuple[str, ...]]  # reward -> its parts
    files: list[Scored]

    def mean(self, reward: str, part: str) -> tuple[float, int]:
        """(mean of a part over the clips with a score, NaN without any; the number of these)."""
        scores = [file.verdicts[reward].scores for file in self.files if reward in file.verdicts]
        valid = [own[part] for own in scores if math.isfinite(own[part])]
        return (sum(valid) / len(valid) if valid else math.nan), len(valid)

    def to_json(self) -> str:
        """All files and the means of every part."""
        means: dict[str, dict[str, Any]] = {}
        for name, parts in self.parts.items():
            own = {part: self.mean(name, part) for part in parts}
            means[name] = {part: {"mean": _or_null(m), "clips": n} for part, (m, n) in own.items()}
        without = {"weights", "where", "urls"}
        rewards = [spec.model_dump(mode="json", exclude=without) for spec in self.specs]
        content = {"rewards": rewards, "files": [file.row() for file in self.files], "means": means}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def score(wanted: Wanted, specs: Sequence[RewardSpec], servers: Servers) -> Result:
    """Score the files by each reward.

    Raises UserError for a wrong setting, a file without a prompt, and where no file can be read.
    """
    _check_columns(specs)
    files = clip_files.expand(wanted.files)
    texts = clip_files.captions(files, wanted.prompt, wanted.prompts)
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    with judges.opened(specs, servers, device) as opened:
        if opened.read_prompts:
            _check_prompts(files, texts)
        pairs = track(
            list(zip(files, texts, strict=True)),
            "scoring",
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        scored = [_score_file(file, text, wanted, opened) for file, text in pairs]
        unread = [file for file in scored if file.shape is None]
        if len(unread) == len(scored):
            more = f" (none of the {len(scored)} files can be scored)" if len(scored) > 1 else ""
            raise UserError(f"{unread[0].problem}{more}")
        return Result(specs, opened.parts, scored)


def _check_columns(specs: Sequence[RewardSpec]) -> None:
    """Raise UserError for a reward that reads more of a prompt's row than its text."""
    for spec in specs:
        if needed := rewards.columns(spec):
            raise UserError(
                f"--reward={spec.name}: reads {needed[0]} of each prompt's row, which files of clips "
                "do not have; name a file of rows with --option rows=FILE."
            )


def _check_prompts(files: Sequence[Path], texts: Sequence[str | None]) -> None:
    """Raise UserError where a clip that can be scored has no prompt."""
    missing = [file for file, text in zip(files, texts, strict=True) if text is None]
    missing = [file for file in missing if file.is_file() and not clip_files.composed(file)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"FILES={missing[0]}{more}: no prompt; give --prompt or --prompts, or write it into "
            f"{missing[0].with_suffix('.txt').name} beside the file."
        )


def _score_file(file: Path, text: str | None, wanted: Wanted, opened: Judges) -> Scored:
    """One file's verdicts, or its problem."""
    if clip_files.composed(file):
        return Scored(
            file=file,
            prompt=text,
            problem=f"{file}: shows several clips together; score the clips themselves.",
        )
    if clip_files.not_finite(file):
        why = f"{file}: was not finite when it was drawn (manifest.json); draw it again."
        return Scored(file=file, prompt=text, problem=why)
    try:
        clip = clip_files.read(file, wanted.fps, wanted.size)
    except UserError as error:
        return Scored(file=file, prompt=text, problem=str(error))
    verdicts = opened.score(clip.pixels, text or "", clip.fps)
    return Scored(
        file=file,
        prompt=text,
        shape=tuple(clip.pixels.shape),
        fps=clip.fps,
        decoder=clip.decoder,
        verdicts=verdicts,
    )


def _or_null(value: float) -> float | None:
    """The value; None where it is not finite, as JSON has no NaN."""
    return value if math.isfinite(value) else None


def show(result: Result) -> None:
    """Print the table: a row per file, a column per part, the means below."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    columns = [(name, part) for name, parts in result.parts.items() for part in parts]
    for name, part in columns:
        table.add_column(f"{name}\n{part}" if len(result.parts) > 1 else part, justify="right")
    notes = any(file.note() for file in result.files)
    if notes:
        table.add_column("why not", overflow="fold")
    for file in result.files:
        scores = {name: verdict.scores for name, verdict in file.verdicts.items()}
        values = [scores[name][part] if name in scores else math.nan for name, part in columns]
        table.add_row(str(file.file), *map(number, values), *([file.note()] if notes else []))
    if len(result.files) > 1:
        table.add_section()
        means = [result.mean(name, part) for name, part in columns]
        valid = min((count for _, count in means), default=0)
        total = len(result.files)
        label = f"mean of {total}" if valid == total else "mean of the valid"
        table.add_row(label, *(number(mean) for mean, _ in means), *([""] if notes else []))
    console().print(table, highlight=False, markup=False)


def console() -> Console:
    """Standard output; without a terminal as wide as the tables, so that they are not cut."""
    return open_console(width=None if sys.stdout.isatty() else 1000, markup=False)


def number(value: float) -> str:
    """A score with five significant digits; a dash where it is not finite."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def write(option: str, file: Path, content: str) -> None:
    """Write a result as a whole, or with "-" print it. Raises UserError where the disk refuses."""
    if str(file) == "-":
        print(content, end="")
        return
    try:
        replace_text(file, content)
    except OSError as error:
        raise UserError(
            f"{option}={file}: cannot be written ({error.strerror}); choose another file.",
        ) from None
