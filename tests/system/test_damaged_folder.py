"""Every file of a run's folder, damaged in every way: no trace, and nothing damaged is believed.

`FASTGRPO_DAMAGE=all pytest -s tests/system/test_damaged_folder.py` takes each file through each
damage and prints the table; without it each file meets one damage in training.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastgrpo.cli.main import main
from tests.harness import runs

RUN = [*runs.SMALLER, "prompts.limit=4", "evaluate.clips=1", "run.iterations=2"]
ALL = os.environ.get("FASTGRPO_DAMAGE") == "all"
OTHER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))
UNREAD = {"report.html", "checkpoints/latest"}
"""Files that the commands write and never read."""


def missing(path: Path, outside: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path, outside: Path) -> None:
    folder = path.is_dir()
    missing(path, outside)
    path.mkdir() if folder else path.touch()


def other(path: Path, outside: Path) -> None:
    missing(path, outside)
    path.write_bytes(OTHER)


def flipped(path: Path, outside: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder(path: Path, outside: Path) -> None:
    missing(path, outside)
    path.mkdir()


def link(path: Path, outside: Path) -> None:
    """To a copy elsewhere, with the same content, which must stay as it is."""
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, outside)
    missing(path, outside)
    path.symlink_to(outside)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "missing": missing,
    "empty": empty,
    "other type": other,
    "byte flipped": flipped,
    "a folder": folder,
    "a link": link,
}


@dataclass(frozen=True)
class Outcome:
    """What a command did with a damaged folder."""

    code: int
    said: str

    @property
    def line(self) -> str:
        """The refusal, or the notices."""
        lines = self.said.splitlines()
        told = ("fastgrpo: ", "run.dir=", "prompts.cache=", "metrics.jsonl", "checkpoint ")
        return "; ".join(line for line in lines if line.startswith(told))

    def tell(self, name: str, damage: str, command: str) -> None:
        """Print the row of the table."""
        line = re.sub(r"/\S*/(a folder|a link|other type|byte flipped|\w+)/run", "RUN", self.line)
        print(f"\n| {name} | {damage} | {command} | {self.code} | {line} |", end="")


def run(*arguments: str) -> Outcome:
    """A command in this process; an error that is no user's mistake is raised."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(arguments))
    return Outcome(code, said.getvalue())


def result(place: Path) -> dict[str, object]:
    """What a run compares, without times and hashes."""
    content: dict[str, object] = json.loads((place / "summary.json").read_text())
    return {key: content[key] for key in ("before", "after", "difference", "ci95", "iterations")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations at its end."""
    place = tmp_path_factory.mktemp("finished") / "run"
    assert run(*runs.arguments(place, RUN)).code == 0
    return place


FILES = (
    "recipe.toml",
    "inputs.json",
    "environment.json",
    "provenance.json",
    "identity.json",
    "hashes.json",
    "lock",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "checkpoints/latest",
    "checkpoints/step-2/.metadata",
    "checkpoints/step-2/__0_0.distcp",
    "checkpoints/step-2/manifest.json",
    "checkpoints/step-2/progress.json",
    "checkpoints/step-2/run.json",
    "evaluation/step-0.json",
    "evaluation/step-0/000.mp4",
    "evaluation/step-2.json",
    "embeddings/manifest.json",
    "embeddings/part-00000.safetensors",
    "embeddings/part-00000.sha256",
    "embeddings/hashes.json",
    "embeddings/lock",
    "heartbeats/rank-0",
    "logs/rank-0.jsonl",
    "checkpoints",
    "checkpoints/step-2",
    "evaluation",
    "evaluation/step-0",
    "embeddings",
    "heartbeats",
    "logs",
)


def damages(name: str) -> list[str]:
    """The damages that training meets in this file here."""
    kinds = (
        list(DAMAGES)
        if "." in Path(name).name or name.endswith(("lock", "latest", "rank-0"))
        else []
    )
    kinds = kinds or ["missing", "empty", "other type", "a link"]
    return kinds if ALL else [kinds[FILES.index(name) % len(kinds)]]


def test_the_table_has_every_file_of_a_run(finished: Path) -> None:
    step = {f"checkpoints/step-{n}" for n in (1, 2)}
    found = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    of_first = {name for name in found if name.startswith("checkpoints/step-1")}
    of_last = {"evaluation/step-2", "evaluation/step-2/000.mp4"}
    assert step <= found and found - of_first - of_last == set(FILES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_training_goes_on_or_says_in_one_line_why_not(
    name: str, finished: Path, tmp_path: Path
) -> None:
    for damage in damages(name):
        place, outside = tmp_path / damage / "run", tmp_path / damage / "outside"
        place.parent.mkdir()
        shutil.copytree(finished, place)
        DAMAGES[damage](place / name, outside)
        before = outside.read_bytes() if outside.is_file() else b""
        outcome = run(*runs.arguments(place, RUN))
        outcome.tell(name, damage, "train")
        assert outcome.code in (0, 2), outcome.said
        assert "Traceback" not in outcome.said
        if outcome.code:
            assert outcome.line.count("fastgrpo: ") == 1
            assert str(place) in outcome.line, "the line does not say where"
        else:
            assert result(place) == result(finished), f"{name}, {damage}: was believed"
        if outside.is_file():
            assert outside.read_bytes() == before, f"{name}: a link was written through"


READ = {
    "report": [name for name in FILES if not name.startswith(("checkpoints", "embeddings"))],
    "status": ["heartbeats/rank-0", "heartbeats"],
    "export": [name for name in FILES if name.startswith("checkpoints")]
    + ["recipe.toml", "identity.json", "summary.json", "metrics.jsonl"],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", READ)
def test_a_reading_command_says_in_one_line_what_is_wrong(
    command: str, finished: Path, tmp_path: Path
) -> None:
    for name in READ[command]:
        for damage in DAMAGES:
            if damage == "byte flipped" and (finished / name).is_dir():
                continue
            place = tmp_path / name.replace("/", "-") / damage / "run"
            place.parent.mkdir(parents=True)
            shutil.copytree(finished, place)
            DAMAGES[damage](place / name, place.parent / "outside")
            destination = [str(place.parent / "exported")] if command == "export" else []
            outcome = run(command, str(place), *destination)
            outcome.tell(name, damage, command)
            assert outcome.code in (0, 1, 2), outcome.said
            assert "Traceback" not in outcome.said
            if outcome.code == 2:
                assert outcome.line.count("fastgrpo: ") == 1
            shutil.rmtree(place.parent)
