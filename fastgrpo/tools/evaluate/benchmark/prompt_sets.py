"""The prompts of a benchmark, with the task or style of each.

GenEval's official file ships with the package. HPS's four files do not: a folder of one file per
style is named. The paper's own test prompts are published nowhere.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgrpo import data
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import sha256
from fastgrpo.core.policy import Prompt
from fastgrpo.data import prompts as prompt_file
from fastgrpo.rewards.common import prompt_rows

GENEVAL_FILE = Path(data.__file__).parent / "geneval" / "evaluation_metadata.jsonl"
GENEVAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
HPS_STYLES, HPS_PROMPTS = 4, 800
TEST_PROMPTS = 1000
HPS_KINDS = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet")
HPS_OPTION = "--hps-prompts"


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in order, each with its task or style; one group "" where there are none."""

    prompts: Sequence[Prompt]
    groups: Sequence[str]
    origin: str
    """The file or folder, its hash, and how far it is the official one."""

    def first(self, limit: int | None) -> "PromptSet":
        """The first `limit` prompts of every group; None: all."""
        if limit is None:
            return self
        seen: dict[str, int] = {}
        chosen = []
        for number, group in enumerate(self.groups):
            seen[group] = seen.get(group, 0) + 1
            if seen[group] <= limit:
                chosen.append(number)
        if len(chosen) == len(self.prompts):
            return self
        return replace(
            self,
            prompts=[self.prompts[number] for number in chosen],
            groups=[self.groups[number] for number in chosen],
            origin=f"{self.origin}; of these the first {limit} of each task or style (--limit)",
        )


def geneval(file: Path | None) -> PromptSet:
    """GenEval's prompts by task.  file: evaluation_metadata.jsonl; None: the one that ships

    Raises UserError for a file that is no such rows.
    """
    chosen = file or GENEVAL_FILE
    try:
        rows = prompt_rows.read(str(chosen), "prompt", "tag")
    except UserError as error:
        raise UserError(str(error).replace(prompt_rows.KEY, "--geneval-prompts", 1)) from None
    found = sha256(chosen)
    official = "the official file" if found == GENEVAL_SHA256 else "not the official file"
    return PromptSet(
        prompts=[Prompt(text) for text in rows],
        groups=[str(row["tag"]) for row in rows.values()],
        origin=f"{chosen.name}, SHA-256 {found[:8]}..., {official}, {len(rows)} prompts",
    )


def hps(folder: Path) -> PromptSet:
    """The HPS benchmark's prompts by style, one file of the folder each.

    Raises UserError for a folder without such files.
    """
    where = f"{HPS_OPTION}={folder}"
    files = [file for file in _listed(folder, where) if file.suffix.lower() in HPS_KINDS]
    if not files:
        raise UserError(
            f"{where}: no prompts there; put one file per style into it, such as anime.json."
        )
    texts = {file.stem: _texts(file, where) for file in files}
    if len(texts) < len(files):
        raise UserError(f"{where}: two files are of one style; leave one file per style there.")
    total = sum(map(len, texts.values()))
    whole = len(texts) == HPS_STYLES and total == HPS_STYLES * HPS_PROMPTS
    size = "as many as" if whole else "not as many as"
    hashes = ", ".join(f"{file.name} {sha256(file)[:8]}..." for file in files)
    return PromptSet(
        prompts=[Prompt(text) for own in texts.values() for text in own],
        groups=[style for style, own in texts.items() for _ in own],
        origin=f"{len(texts)} styles, {total} prompts, {size} the benchmark's {HPS_STYLES} x "
        f"{HPS_PROMPTS}; SHA-256 {hashes}",
    )


def _listed(folder: Path, where: str) -> Iterable[Path]:
    """The files of a folder, by name."""
    try:
        return sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); name the folder of the benchmark's "
            "prompts."
        ) from None


def _texts(file: Path, where: str) -> list[str]:
    """The prompts of one style: a JSON list of texts, as published, or any file of prompts."""
    if file.suffix.lower() == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{where}: {file.name} is not JSON ({error}); correct it.") from None
        if isinstance(content, list) and content and all(isinstance(t, str) for t in content):
            return [" ".join(text.split()) for text in content]
    settings = config.Prompts(train=str(file))
    return [prompt.text for prompt in prompt_file.read(settings, str(file), where, None).prompts]


def test(prompts: Sequence[Prompt], file: str | None) -> PromptSet:
    """The prompts that stand for the paper's test prompts.  file: None: the recipe's held-out ones"""
    named = "the recipe's held-out prompts"
    if file is not None:
        named = f"{Path(file).name}"
        named += f", SHA-256 {sha256(Path(file))[:8]}..." if Path(file).is_file() else ""
    return PromptSet(
        prompts=list(prompts),
        groups=[""] * len(prompts),
        origin=f"{named}, {len(prompts)}; the paper's {TEST_PROMPTS:,} are not published",
    )
