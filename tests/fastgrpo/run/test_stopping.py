"""A run that is asked to stop saves what lies between two iterations, and goes on from there bit
for bit.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from fastgrpo.core import config, files
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import OneRankError
from fastgrpo.parallel.world import open_world
from fastgrpo.run import stopping
from fastgrpo.run.stopping import Signals, Stop, answer_mistake
from fastgrpo.session import Session
from fastgrpo.train import train
from fastgrpo.training.trainer import Trainer
from tests import ROOT
from tests.harness import forks, runs

ITERATIONS = 3


def recipe(folder: Path) -> Recipe:
    """Eight samples, so two batches of a rollout; two optimizer steps of at least two micro-batches
    each.
    """
    small = [
        "checkpoint.every=10",
        "optimizer.batch_size=4",
        f"run.iterations={ITERATIONS}",
        f"run.dir={folder}",
    ]
    return config.load(runs.RECIPE, [*runs.SMALL, *runs.SMALLER, *small])


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/step-*"))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_stopped_at_each_kind_of_moment_and_resumed_is_bit_for_bit_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    moments: list[str] = []  # "boundary", "optimizer step", as they happen
    asked_at: dict[str, int] = {}  # moment -> its count at which a signal comes

    def note(moment: str) -> None:
        moments.append(moment)
        if moments.count(moment) == asked_at.get(moment):
            os.kill(os.getpid(), signal.SIGUSR1 if moment == "boundary" else signal.SIGTERM)

    real_ask, real_step = Stop._ask, Trainer.step

    def ask(stop: Stop, busy: bool) -> tuple[Any, Tensor]:
        note("boundary")
        return real_ask(stop, busy)

    def step(trainer: Trainer) -> Tensor:
        norm = real_step(trainer)
        note("optimizer step")
        return norm

    monkeypatch.setattr(Stop, "_ask", ask)
    monkeypatch.setattr(Trainer, "step", step)

    assert train(recipe(calm)) is not None
    assert moments.count("optimizer step") == 2 * ITERATIONS
    first = moments[
        : [n for n, moment in enumerate(moments) if moment == "optimizer step"][1]
    ].count("boundary")
    # a batch of evaluation, of starts, two of samples, two micro-batches, and each one's end
    assert first >= 10

    def attempt(**at: int) -> list[str]:
        """Run until a signal at the n-th of these moments stops it.  returns the checkpoints"""
        moments.clear()
        asked_at.clear()
        asked_at.update({name.replace("_", " "): number for name, number in at.items()})
        assert train(recipe(stormy)) is None
        assert (stormy / "requeue").read_text() == "yes\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return checkpoints(stormy)

    # at the end of the evaluation before training, and before the second batch of the first
    # rollout: nothing to save
    assert attempt(boundary=2) == []
    assert attempt(boundary=6) == []
    # before the second micro-batch of the second iteration: the first is saved
    assert attempt(boundary=first + 7) == ["step-1"]
    # in the rollout after the resumption: that is saved already
    assert attempt(boundary=1) == ["step-1"]
    # after the first optimizer step of the second iteration: it is finished first
    assert attempt(optimizer_step=1) == ["step-1", "step-2"]
    # after the last one of all: before the evaluation that would follow
    assert attempt(optimizer_step=2)[-1] == "step-3"

    asked_at.clear()
    assert train(recipe(stormy)) is not None
    assert not (stormy / "requeue").exists()
    runs.assert_same_checkpoint(
        runs.checkpoint(calm, ITERATIONS, tmp_path), runs.checkpoint(stormy, ITERATIONS, tmp_path)
    )
    assert [row["iteration"] for row in runs.metrics(stormy)] == list(range(ITERATIONS))
    for one, other in zip(runs.metrics(calm), runs.metrics(stormy), strict=True):
        assert one["reward/sum"] == other["reward/sum"]


@pytest.mark.timeout(120)
def test_all_ranks_stop_at_the_same_boundary_whatever_their_number_of_pieces(
    tmp_path: Path,
) -> None:
    expected = {
        "nobody": ["3 all done", "1 all done"],
        "second rank": ["2 stopped", "1 stopped"],  # the answer is read a piece later
        "first rank": ["3 stopped", "1 stopped"],
        "file": ["2 stopped", "1 stopped"],
    }
    answers = {"nobody": None, "second rank": "yes\n", "first rank": "yes\n", "file": "no\n"}
    done = forks.run("tests.harness.workers.stopping", [str(tmp_path), *expected], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, lines in expected.items():
        assert [(tmp_path / name / rank).read_text() for rank in "01"] == lines, name
        answer = tmp_path / name / "requeue"
        assert (answer.read_text() if answer.exists() else None) == answers[name]
        assert not (tmp_path / name / "stop").exists()


def test_a_signal_that_comes_before_the_handlers_is_held_back_and_heard() -> None:
    """fastgrpo/cli/launch.py blocks SIGUSR1 as its first act; importing torch takes seconds."""
    code = """
import json, os, signal, sys
sys.modules["fastgrpo.cli.main"] = cli = type(sys)("fastgrpo.cli.main")
def main(argv):
    os.kill(os.getpid(), signal.SIGUSR1)  # would end a process without a handler
    from fastgrpo.run.stopping import Signals
    with Signals() as signals:
        os.write(1, json.dumps(signals.received).encode())
    return 0
cli.main = cli.console = main
import fastgrpo
fastgrpo.cli = cli
from pathlib import Path
from fastgrpo.cli import launch
launch.main(Path("x.toml"), [])
"""
    environment = os.environ | {"FASTGRPO_SETTLED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is True


def test_signals_are_only_remembered_inside_the_context() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    for number, handler in zip(stopping.SIGNALS, before, strict=True):
        if handler is signal.SIG_IGN:  # as SIGHUP under nohup: it stays so
            continue
        with Signals() as signals:
            assert not signals.received
            signal.raise_signal(number)  # to this thread, which sees it before the next line
            assert signals.received
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


@pytest.mark.parametrize(
    ("file", "answer"), [(None, "yes\n"), ("slurm\n", "yes\n"), ("", "no\n"), ("enough\n", "no\n")]
)
def test_a_job_goes_on_where_slurm_asked_and_not_where_a_person_did(
    tmp_path: Path, file: str | None, answer: str
) -> None:
    """file: what the file `stop` holds; none = a rank had a signal"""
    with open_world() as world:
        stop = Stop(tmp_path, Signals(), world)
        if file is not None:
            stop.file.write_text(file)
        stop.tell()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"requeue": answer}


MISTAKES = {
    "prompts.train=/nowhere/prompts.txt": "no such file",  # read first
    "distributed.shard=3": "distributed.shard=3: ",  # where the ranks meet
    "rewards.0.weights={XQ=1.0}": "has no part 'XQ'",  # once the folder is this run's
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_at_any_moment_is_answered_with_no(tmp_path: Path, override: str) -> None:
    (tmp_path / "run").mkdir()  # as the batch script does, for its logs
    overrides = [*runs.SMALL, *runs.SMALLER, f"run.dir={tmp_path / 'run'}", override]
    with pytest.raises(UserError, match=re.escape(MISTAKES[override])):
        train(config.load(runs.RECIPE, overrides))
    assert (tmp_path / "run" / "requeue").read_text() == "no\n"


def test_a_mistake_before_the_folder_is_needed_leaves_none(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", "prompts.train=/nowhere/prompts.txt"]
    with pytest.raises(UserError, match="no such file"):
        train(config.load(runs.RECIPE, overrides))
    assert not list(tmp_path.iterdir())


def test_another_recipe_in_the_folder_is_answered_with_no(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "recipe.toml").write_text(recipe(tmp_path).to_toml())
    with pytest.raises(UserError, match="holds a run of another recipe"):
        train(config.load(runs.RECIPE, [f"run.dir={tmp_path}", "optimizer.lr=0.5"]))
    assert (tmp_path / "requeue").read_text() == "no\n"


def test_one_ranks_mistake_is_answered_before_it_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[bool] = []
    real = dist.destroy_process_group  # which may wait for them

    def destroy() -> None:
        there.append((tmp_path / "requeue").exists())
        real()

    def run(session: Session) -> None:
        raise OneRankError("the GPU has no room for the rollout")

    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    monkeypatch.setattr("fastgrpo.train.run", run)
    with pytest.raises(OneRankError):
        train(recipe(tmp_path))
    assert there == [True] and (tmp_path / "requeue").read_text() == "no\n"


def test_the_folder_of_another_run_gets_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the lock itself is missed, nor after another mistake."""
    monkeypatch.setattr(files, "PATIENCE_S", 0.0)
    with (tmp_path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            train(recipe(tmp_path))
        with pytest.raises(UserError, match="no such file"):
            train(
                config.load(
                    runs.RECIPE, [f"run.dir={tmp_path}", "prompts.train=/nowhere/prompts.txt"]
                )
            )
        assert not (tmp_path / "requeue").exists()
    answer_mistake(tmp_path)
    assert (tmp_path / "requeue").read_text() == "no\n"


def test_a_terminal_that_goes_away_stops_in_good_order_but_not_under_nohup() -> None:
    for ignored in (False, True):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            with Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                assert signals.received == (not ignored)
            assert signal.getsignal(signal.SIGHUP) == (
                signal.SIG_IGN if ignored else signal.SIG_DFL
            )
        finally:
            signal.signal(signal.SIGHUP, before)
