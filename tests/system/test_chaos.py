"""SIGKILL at random moments, and full disks: the weights are at last those of the undisturbed run,
bit for bit.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch

from fastgrpo.checkpoint.resume import holds_run
from tests import ROOT
from tests.harness import chaos, forks, runs
from tests.harness.chaos import InCall, InFile

RUN = (
    "prompts.limit=20",
    "rewards.0.where=process",
    "evaluate.prompts=1",
    "evaluate.clips=0",
    "rollout.samples_per_prompt=2",
    "rollout.steps=3",
    "optimizer.updates_per_iteration=1",
    "checkpoint.every=2",
)
ROLLOUT, UPDATE, SAVE, LOAD = (
    "fastgrpo.training.scoring.drawing:Rollouts.draw",
    "fastgrpo.train:update",
    "fastgrpo.checkpoint.checkpoints:Checkpoints.save",
    "fastgrpo.checkpoint.checkpoints:Checkpoints.load",
)
KEPT = 2
KILLS = int(os.environ.get("FASTGRPO_KILLS", "0"))
"""How many kills, over torchrun and the reward server too; 0: the thirty of every suite."""
SERVED = tuple(entry for entry in RUN if not entry.startswith("rewards"))


@dataclass(frozen=True)
class Outside:
    """A kill from outside, some time after an iteration has ended."""

    whom: Literal["all", "parent", "server, then parent"]
    served: bool = False  # whether a reward server runs beside the first rank
    torchrun: bool = False  # the real one, with imports of its own


Kill = tuple[str, InFile | InCall | Outside, int]
"""What for a person, the moment, the rank."""


def storm(chance: random.Random) -> list[Kill]:
    """As many kills as are wanted."""
    if not KILLS:
        return moments(chance)
    kills: list[Kill] = []
    while len(kills) < KILLS:
        more: list[Kill] = [
            ("all and the server", Outside("all", served=True), 0),
            ("the server, then the parent", Outside("server, then parent", served=True), 0),
            ("torchrun", Outside("parent", served=True, torchrun=True), 0),
            ("all of torchrun", Outside("all", served=True, torchrun=True), 0),
            ("torchrun's server", Outside("server, then parent", served=True, torchrun=True), 0),
        ]
        several = [*moments(chance), *more, *more]
        chance.shuffle(several)
        kills += several
    return kills[:KILLS]


def moments(chance: random.Random) -> list[Kill]:
    """Thirty kills in random order."""
    step = r"/checkpoints/step-\d+"
    files = {
        "save, before the folder": InFile(rf"mkdir .*{step}\.partial"),
        "save, before a part": InFile(
            rf"write .*{step}\.partial/__0_0\.distcp", chance.randint(1, 2)
        ),
        "save, before the metadata": InFile(rf"rename .*{step}\.partial/\.metadata"),
        "publish, parts without manifest": InFile(
            rf"write .*{step}\.partial/progress\.json", chance.randint(1, 2)
        ),
        "publish, before the manifest": InFile(rf"write .*{step}\.partial/manifest\.json"),
        "publish, before the flush": InFile(rf"read .*{step}\.partial$"),
        "publish, before the rename": InFile(
            rf"rename .*{step}\.partial .*{step}$", chance.randint(1, 2)
        ),
        "publish, before `latest` is written": InFile(r"write .*/latest\.\w+\.partial"),
        "publish, before `latest` is replaced": InFile(r"rename .*/latest\.\w+\.partial"),
        "prune, before the rename": InFile(rf"rename .*{step} .*{step}\.partial$"),
        "prune, half removed": InFile(r"remove __1_0\.distcp", chance.randint(1, 2)),
    }
    found: list[Kill] = [(name, moment, 0) for name, moment in files.items()]
    found.append(("save, second rank's part", InFile(rf"write .*{step}\.partial/__1_0\.distcp"), 1))
    found.append(
        ("publish, second rank hashes", InFile(rf"read .*{step}\.partial/__1_0\.distcp"), 1)
    )
    for name, function, times, longest_s in (
        ("rollout", ROLLOUT, 4, 0.2),
        ("update", UPDATE, 4, 0.2),
        ("save, anywhere", SAVE, 3, 0.2),
        ("resume", LOAD, 2, 0.5),
    ):
        for turn in range(times):
            count = 1 if function is LOAD else chance.randint(1, 3 if function is not SAVE else 1)
            found.append((name, InCall(function, count, chance.uniform(0.0, longest_s)), turn % 2))
    found += [("all from outside", Outside("all"), 0)] * 2
    found += [("the parent of the ranks", Outside("parent"), 0)] * 2
    chance.shuffle(found)
    return found


def begin(
    folder: Path, moment: InFile | InCall | Outside, rank: int, background: bool
) -> "forks.Started | subprocess.Popen[bytes]":
    outside = moment if isinstance(moment, Outside) else None
    settings = [
        *(SERVED if outside and outside.served else RUN),
        "run.iterations=1000",
        f"checkpoint.keep={KEPT}",
        f"checkpoint.background={background}",
    ]
    output, errors = folder.with_suffix(".out"), folder.with_suffix(".err")
    if outside and outside.torchrun:
        return by_torchrun(folder, settings, output, errors)
    return forks.start(
        "fastgrpo.cli",
        arguments=runs.arguments(folder, settings),
        ranks=2,
        output=output,
        errors=errors,
        first=None if isinstance(moment, Outside) else chaos.mine(moment, rank),
    )


def by_torchrun(
    folder: Path, settings: Sequence[str], output: Path, errors: Path
) -> "subprocess.Popen[bytes]":
    """Start the real command line of two ranks."""
    with output.open("wb") as out, errors.open("wb") as err:
        return subprocess.Popen(
            runs.command(folder, settings, ranks=2),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=out,
            stderr=err,
        )


def kill_from_outside(pid: int, moment: Outside) -> list[int]:
    """Kill whom is meant.  returns the processes that must be gone then"""
    below = descendants(pid)
    if moment.whom == "server, then parent":
        kill([other for rank in children(pid) for other in children(rank)])
        time.sleep(0.3)
    kill([pid, *below] if moment.whom == "all" else [pid])
    return [*below, *descendants(pid)]


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def grown(folder: Path, already: int) -> bool:
    return lines(folder) != already


def until(reached: Callable[[], object], what: str, limit_s: float = 300.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, f"{what} after {limit_s:.0f} s"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run, in this order."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """All processes below one that still run."""
    return [below for child in children(pid) for below in (child, *descendants(child))]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def gone(pids: list[int]) -> bool:
    """Whether none runs; one that nobody has waited for yet does not."""

    def runs_on(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        return False

    return not any(map(runs_on, pids))


@pytest.mark.slow
@pytest.mark.timeout(900 + 60 * KILLS)
def test_thirty_kills_end_with_the_weights_of_the_undisturbed_run(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    chance = random.Random(0)
    seen: dict[int, dict[str, str]] = {}
    before: dict[int, dict[str, str]] = {}
    kills = storm(chance)
    assert len(kills) == (KILLS or 30)
    for name, moment, rank in kills:
        process = begin(stormy, moment, rank, background=chance.random() < 0.5)
        below: list[int] = []
        outside = isinstance(moment, Outside)
        if isinstance(moment, Outside):
            already = lines(stormy)
            until(partial(grown, stormy, already), "no iteration")
            time.sleep(chance.uniform(0.0, 0.5))
            below = kill_from_outside(process.pid, moment)
        assert process.wait(runs.LIMIT) == (-signal.SIGKILL if outside else 1), name
        until(partial(gone, below), f"{name}: a rank is left")
        after = chaos.published(stormy)
        newest = max(before, default=0)
        assert newest in after or max(after, default=0) > newest, f"{name}: lost step-{newest}"
        assert len(after) >= min(len(before), KEPT), name
        resumed = f"resumed from checkpoint step-{newest}"
        said = stormy.with_suffix(".out").read_text()
        assert resumed in said or "resumed" not in said, name
        print(f"{name}: {len(after)} published, newest step-{max(after, default=0)}")
        seen |= after
        before = after
    last = max(seen) + 2
    runs.succeed(stormy, [*RUN, f"run.iterations={last}"], ranks=2)
    runs.succeed(calm, [*RUN, f"run.iterations={last}", "checkpoint.keep=1000"], ranks=2)
    undisturbed = chaos.published(calm)
    for step, parts in seen.items():
        assert parts == undisturbed[step], f"step-{step} is not the undisturbed run's"
    runs.assert_same_checkpoint(
        runs.checkpoint(calm, last, tmp_path), runs.checkpoint(stormy, last, tmp_path)
    )
    assert [row["iteration"] for row in runs.metrics(stormy)] == list(range(last))
    for one, other in zip(runs.metrics(calm), runs.metrics(stormy), strict=True):
        assert one["reward/sum"] == other["reward/sum"]


def both_import(torchrun: int) -> bool:
    """Whether both ranks have come as far as the libraries, which they take seconds to import."""
    maps = []
    for pid in children(torchrun):
        with contextlib.suppress(OSError):
            maps.append(Path(f"/proc/{pid}/maps").read_text())
    return sum("libtorch" in text for text in maps) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_or_a_rank_killed_leaves_no_process_and_no_trace(tmp_path: Path) -> None:
    """The real command lines, with the reward server beside the first rank."""
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    served = [entry for entry in RUN if not entry.startswith("rewards")]
    for whom in (
        "torchrun, while the ranks import",
        "torchrun",
        "all but the reward server",
        "the first rank",
    ):
        process = subprocess.Popen(
            runs.command(stormy, [*served, "run.iterations=1000"], ranks=2),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        already = lines(stormy)
        if whom.endswith("import"):
            until(partial(both_import, process.pid), "no ranks")
        else:
            until(partial(grown, stormy, already), "no iteration")
        ranks, below = children(process.pid), descendants(process.pid)
        assert len(ranks) == 2 and len(below) == (2 if whom.endswith("import") else 3), (
            "the ranks and the server"
        )
        kill(
            {"all but the reward server": [process.pid, *ranks], "the first rank": ranks[:1]}.get(
                whom, [process.pid]
            )
        )
        process.wait(timeout=60)
        until(partial(gone, below), f"{whom}: a process is left", limit_s=20.0)
        chaos.published(stormy)
    last = max(lines(stormy) + 1, 4)
    runs.succeed(stormy, [*served, f"run.iterations={last}"], ranks=2)
    runs.succeed(calm, [*RUN, f"run.iterations={last}"], ranks=2)
    runs.assert_same_checkpoint(
        runs.checkpoint(calm, last, tmp_path), runs.checkpoint(stormy, last, tmp_path)
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_on_a_full_disk_training_goes_on_and_the_last_checkpoint_stays(
    background: bool, small_disk: Path, tmp_path: Path
) -> None:
    """The whole run folder on it: with adapters alone some checkpoints fit, until they fill it."""
    adapters = [
        *RUN,
        "lora.rank=8",
        "checkpoint.every=1",
        "checkpoint.keep=100",
        f"checkpoint.background={background}",
    ]
    result = runs.forked(small_disk, [*adapters, "run.iterations=12"], ranks=2)
    good = chaos.published(small_disk)
    newest = max(good)
    assert 2 <= newest < 11 and set(good) == set(range(1, newest + 1))
    assert [row["iteration"] for row in runs.metrics(small_disk)] == list(range(12))
    assert result.returncode == 1
    for step in range(newest + 1, 13):
        told = f"checkpoint step-{step} could not be written (No space left on device: it takes "
        assert told in (result.stdout if step < 12 else result.stderr)
    assert result.stderr.count("fastgrpo: ") == 1 and "Traceback" not in result.stderr
    assert not list(small_disk.rglob("*.partial"))
    shutil.rmtree(small_disk / "checkpoints" / "step-1")
    shutil.rmtree(small_disk / "checkpoints" / "step-2")
    out = runs.succeed(
        small_disk, [*adapters, "checkpoint.every=10", f"run.iterations={newest + 1}"], ranks=2
    )
    assert f"resumed from checkpoint step-{newest}" in out
    calm = tmp_path / "calm"
    runs.succeed(calm, [*adapters, f"run.iterations={newest + 1}"], ranks=2)
    undisturbed = chaos.published(calm)
    assert good | chaos.published(small_disk) == undisturbed


def test_where_no_checkpoint_fits_training_goes_on_to_its_end(small_disk: Path) -> None:
    result = runs.forked(small_disk, [*RUN, "checkpoint.every=1"])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for step, told in ((1, result.stdout), (3, result.stderr)):
        assert (
            f"checkpoint step-{step} could not be written (No space left on device: it takes "
            in told
        )
    assert [row["iteration"] for row in runs.metrics(small_disk)] == [0, 1, 2]
    assert not chaos.published(small_disk) and not list(small_disk.rglob("*.partial"))


def small_files_only(rank: int) -> None:
    """As a quota does, which no look at the disk foretells: the second rank's writes fail
    half-way.
    """
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_half_way_on_one_rank_leaves_the_one_before(
    background: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = [*RUN, "checkpoint.every=1", f"checkpoint.background={background}"]
    runs.succeed(folder, [*settings, "run.iterations=1"], ranks=2)
    good = chaos.published(folder)
    out, errors = tmp_path / "out", tmp_path / "err"
    command = runs.arguments(folder, [*settings, "run.iterations=3"])
    assert (
        forks.start(
            "fastgrpo.cli",
            arguments=command,
            ranks=2,
            output=out,
            errors=errors,
            first=small_files_only,
        ).wait(runs.LIMIT)
        == 1
    )
    for step, told in ((2, out.read_text()), (3, errors.read_text())):
        assert re.search(
            rf"checkpoint step-{step} could not be written \((File too large|a file could not)",
            told,
        )
    assert "Traceback" not in errors.read_text() and errors.read_text().count("fastgrpo: ") == 1
    assert chaos.published(folder) == good and not list(folder.rglob("*.partial"))
    assert [row["iteration"] for row in runs.metrics(folder)] == [0, 1, 2]
    assert "resumed from checkpoint step-1" in runs.succeed(
        folder, [*settings, "run.iterations=2"], ranks=2
    )
    assert set(chaos.published(folder)) == {1, 2}


PHASES = {
    "rollout": "fastgrpo.training.rollout:sample",
    "decode": "fastgrpo.models.hunyuan_video:HunyuanVideo.decode",
    "reward": "fastgrpo.training.scoring.scorer:Scorer.collect",
    "update": "fastgrpo.train:update",
    "save": "fastgrpo.checkpoint.checkpoints:Checkpoints.save",
    "evaluate": "fastgrpo.session.held_out:evaluate",
}


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_of_one_rank_ends_the_job_with_its_traceback(tmp_path: Path, phase: str) -> None:
    """On NCCL's rule, by which ranks destroy their communicators together."""
    errors = tmp_path / "errors"
    start = time.monotonic()
    run = forks.start(
        "fastgrpo.cli",
        arguments=runs.arguments(tmp_path / "run", [*RUN, "run.iterations=2"]),
        ranks=2,
        errors=errors,
        first=partial(chaos.fail, RuntimeError, PHASES[phase], 1, tmp_path),
    )
    assert run.wait(runs.LIMIT) == 1
    took = time.monotonic() - start
    assert took < 90  # the other rank is waited for, and then killed
    print(f"{phase}: ended {took:.1f} s after the start, exit code 1")
    said = errors.read_text()
    assert said.count("RuntimeError: planted on one rank") == 1 and "Traceback" in said
    assert "checkpoints.py" in said if phase == "save" else "train.py" in said
    assert reported(tmp_path / "run", "RuntimeError: planted on one rank")
    assert not list(tmp_path.glob("destroyed-1"))


def reported(folder: Path, cause: str) -> bool:
    """Whether a run's report tells the cause, as it would of the first rank's; or none is due."""
    page = folder / "report.html"
    if not holds_run(folder) and not any(folder.glob("evaluation/step-*.json")):
        return not page.exists()
    return f"The newest attempt ended by an error: {cause}" in page.read_text()


ROOM = {
    "rollout": "rollout.batch_size=4: lower it, or set distributed.rollout_weights=sharded",
    "decode": "model.decode_batch=none: set it to 1",
    "reward": "rewards: give them a device of their own, or a server",
    "update": "optimizer.batch_size=8: lower it, or set model.gradient_checkpointing=true",
    "save": "distributed.offload=false: set it to true",
    "evaluate": "rollout.batch_size=4: lower it, or set model.decode_batch=1",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_gpu_without_room_is_one_line_and_the_run_resumes(tmp_path: Path, phase: str) -> None:
    """On one rank, in training; the functions outside an iteration are first called before it."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    settings = [*RUN, "run.iterations=2", "checkpoint.every=1"]
    run = forks.start(
        "fastgrpo.cli",
        arguments=runs.arguments(folder, settings),
        ranks=2,
        errors=errors,
        first=partial(chaos.fail, torch.OutOfMemoryError, PHASES[phase], 1, tmp_path),
    )
    assert run.wait(runs.LIMIT) == 1
    said = [line for line in errors.read_text().splitlines() if line.startswith("fastgrpo: rank 1")]
    # the first decode and the first scores are the evaluation's
    where = "evaluate" if phase in ("decode", "reward") else phase
    assert said == [
        f"fastgrpo: rank 1: {ROOM[where]}: the GPU has no room for the {where}. The newest "
        "checkpoint is intact: start again after the change."
    ]
    assert (folder / "requeue").read_text() == "no\n"
    assert reported(folder, ROOM[where].partition(":")[0])
    runs.succeed(folder, settings, ranks=2)
    assert len(runs.metrics(folder)) == 2
