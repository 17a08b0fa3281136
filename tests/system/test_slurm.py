"""A real slurm of two nodes on this machine: a job that is warned, and one that loses a rank, end
as if undisturbed.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.harness import runs

CLUSTER = ROOT / "tests" / "system" / "slurm_cluster.sh"
LAUNCH = ROOT / "launch" / "t2v_tiny.sh"
ITERATIONS = 4
# sharded over both nodes, as over the two processes of the undisturbed run: replicas would add in
# another order
OVERRIDES = (
    *runs.SMALL,
    *runs.SMALLER,
    f"run.iterations={ITERATIONS}",
    "checkpoint.every=10",
    "distributed.shard=2",
)
NO_CLUSTER = 3  # exit code of the script where this machine cannot have one


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for slurm's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    # not captured through pipes, which the daemons would keep open
    with (folder / "start.log").open("w") as log:
        started = subprocess.run(
            ["bash", str(CLUSTER), "start", str(folder)], stdout=log, stderr=log, check=False
        )
    told = (folder / "start.log").read_text()
    if started.returncode == NO_CLUSTER:
        pytest.skip(told.strip().splitlines()[-1])
    assert started.returncode == 0, told
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "FASTGRPO_"))
    }
    try:
        yield mine | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "FASTGRPO_PROCESSES": "1",
            "OMP_NUM_THREADS": "1",
        }
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], check=True)


def ask(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(condition: Callable[[], object], what: str, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {limit_s:.0f} s"
        time.sleep(0.1)


def iterations(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def ranks(folder: Path) -> list[int]:
    """The processes that train into a folder, not those that start them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_text().split("\0")
            if (
                f"run.dir={folder}" in arguments
                and any(a == str(LAUNCH) for a in arguments[1:3])
                and "-u" in arguments
            ):
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_warned_and_crashed_job_goes_on_to_the_weights_of_an_undisturbed_run(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    calm, stormy, log = tmp_path / "calm", tmp_path / "stormy", tmp_path / "job.log"
    submitted = ask(
        slurm,
        "sbatch",
        "--nodes=2",
        f"--output={log}",
        str(LAUNCH),
        *OVERRIDES,
        f"run.dir={stormy}",
    )
    job = submitted.split()[-1]

    def told(text: str) -> int:
        return log.read_text().count(text) if log.exists() else 0

    try:
        until(lambda: iterations(stormy) >= 1, "first iteration")
        # as #SBATCH --signal=B:USR1@300 does
        ask(slurm, "scancel", "--batch", "--signal=USR1", job)
        until(lambda: told("stopped in good order, newest checkpoint step-"), "answer to SIGUSR1")
        saved = int((stormy / "checkpoints" / "latest").read_text().removeprefix("step-"))
        assert 1 <= saved < ITERATIONS

        until(lambda: told(f"resumed from checkpoint step-{saved}"), "second start")
        until(lambda: len(ranks(stormy)) == 2, "two ranks")
        os.kill(ranks(stormy)[-1], signal.SIGKILL)
        until(lambda: told("crashed (exit code "), "answer to the crash")

        until(lambda: told(f"resumed from checkpoint step-{saved}") == 2, "third start")
        runs.succeed(calm, [*OVERRIDES], ranks=2)
        until(
            lambda: job not in ask(slurm, "squeue", "--noheader", "--format=%i"), "end of the job"
        )
        shown = ask(slurm, "scontrol", "show", "job", job)
        assert "JobState=COMPLETED" in shown and "Restarts=2" in shown
    except BaseException:
        print(log.read_text() if log.exists() else "no log")
        raise

    runs.assert_same_checkpoint(
        runs.checkpoint(calm, ITERATIONS, tmp_path), runs.checkpoint(stormy, ITERATIONS, tmp_path)
    )
    assert [row["iteration"] for row in runs.metrics(stormy)] == list(range(ITERATIONS))
    attempts = {path.parent.name for path in stormy.glob(f"logs/job-{job}-*/n[12]")}
    assert attempts == {f"job-{job}-{attempt}" for attempt in range(3)}
    outputs = [file.read_text() for file in stormy.glob(f"logs/job-{job}-2/n1/**/stdout.log")]
    assert any(re.search(rf"iteration {ITERATIONS}/{ITERATIONS} ", text) for text in outputs)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_persons_stop_and_a_persons_mistake_are_not_requeued(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """The mistake, a mesh that does not divide the ranks, shows only once these have met."""

    def submit(name: str, *overrides: str) -> str:
        log = tmp_path / f"{name}.log"
        command = [
            "sbatch",
            "--nodes=1",
            f"--output={log}",
            str(LAUNCH),
            *runs.SMALL,
            *runs.SMALLER,
        ]
        return ask(slurm, *command, f"run.dir={tmp_path / name}", *overrides).split()[-1]

    def ended(job: str) -> str:
        until(
            lambda: job not in ask(slurm, "squeue", "--noheader", "--format=%i"), "end of the job"
        )
        return ask(slurm, "scontrol", "show", "job", job)

    stopped = submit("stopped", "run.iterations=1000", "checkpoint.every=1000")
    until(lambda: iterations(tmp_path / "stopped") >= 1, "first iteration")
    (tmp_path / "stopped" / "stop").touch()
    shown = ended(stopped)
    assert "JobState=COMPLETED" in shown and "Restarts=0" in shown
    assert (tmp_path / "stopped" / "requeue").read_text() == "no\n"
    assert (tmp_path / "stopped" / "checkpoints" / "latest").exists()

    shown = ended(submit("mistaken", "distributed.shard=3"))
    assert "JobState=FAILED" in shown and "Restarts=0" in shown
    assert (tmp_path / "mistaken.log").read_text().count("fastgrpo: distributed.shard=3: ") == 1
