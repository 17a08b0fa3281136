"""A run's folder that goes away, or takes no checkpoints any more, under the run; and no memory."""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastgrpo import train
from fastgrpo.cli.main import main
from fastgrpo.core import config
from fastgrpo.core.processes import OneRankError
from fastgrpo.run.failures import out_of_memory
from fastgrpo.session import Session
from tests.harness import chaos, runs

RUN = [*runs.SMALLER, "prompts.limit=4"]


def started(place: Path, *more: str) -> tuple[int, str]:
    """A run in this process.  returns exit code and all that was said"""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(runs.arguments(place, [*RUN, *more]))
    return code, said.getvalue()


def damaged(
    monkeypatch: pytest.MonkeyPatch, damage: Callable[[], object], iteration: int = 1
) -> None:
    """Have an iteration begin with a damage."""
    real = train.iterate

    def iterate(session: Session) -> None:
        if session.progress.iteration == iteration:
            damage()
        real(session)

    monkeypatch.setattr(train, "iterate", iterate)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A run whose checkpoints lie on a file system that this turns read-only."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")

    def turn() -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)

    try:
        yield turn
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_where_checkpoints_turn_read_only(
    background: bool,
    tmp_path: Path,
    read_only: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, settings = tmp_path / "run", f"checkpoint.background={background}"
    with monkeypatch.context() as patch:
        damaged(patch, read_only, 2 if background else 1)  # then step-1 is written in both cases
        code, said = started(place, "run.iterations=4", settings)
    assert code == 2 and "Traceback" not in said
    assert "training goes on without it" in said and said.count("fastgrpo: ") == 1
    assert "checkpoint step-3 could not be written (" in said and "Read-only file system" in said
    assert [row["iteration"] for row in runs.metrics(place)] == [0, 1, 2, 3]
    assert set(chaos.published(place)) == {1}
    subprocess.run(["mount", "-o", "remount,rw", str(place / "checkpoints")], check=True)
    code, said = started(place, "run.iterations=2", settings)
    assert code == 0 and "resumed from checkpoint step-1" in said


@pytest.mark.slow
def test_a_folder_that_goes_away_is_one_line_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        damaged(patch, lambda: shutil.move(place, elsewhere))
        code, said = started(place)
    assert code == 2 and "Traceback" not in said
    assert said.count("fastgrpo: ") == 1 and "No such file or directory" in said
    shutil.rmtree(place, ignore_errors=True)  # heartbeats and logs
    shutil.move(elsewhere, place)
    code, said = started(place)
    assert code == 0 and "resumed from checkpoint step-1" in said
    assert [row["iteration"] for row in runs.metrics(place)] == [0, 1]


@pytest.mark.slow
def test_metrics_removed_under_a_run_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run"
    damaged(monkeypatch, lambda: (place / "metrics.jsonl").unlink())
    assert started(place)[0] == 0
    assert [row["iteration"] for row in runs.metrics(place)] == [0, 1]


def no_memory() -> None:
    torch.empty(2**62, dtype=torch.uint8)  # PyTorch's own error


def no_object() -> None:
    raise MemoryError


@pytest.mark.parametrize("fill", [no_memory, no_object])
def test_a_machine_without_memory_is_one_line(
    fill: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = config.load(runs.RECIPE)
    with pytest.raises(OneRankError), out_of_memory.one_line(recipe, lambda: "update"):
        fill()
    assert "this machine's memory has no room for the update" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="other"), out_of_memory.one_line(recipe, str):
        raise RuntimeError("other")
