"""Two ranks killed with SIGKILL at ten random moments end with the weights of an undisturbed run, bit for bit."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fastgrpo import checkpoint
from tests import runs

ITERATIONS = 12
KILLS = 10


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Two ranks in a process group of their own, so that all can be killed at once."""
    overrides = [f"run.iterations={ITERATIONS}", "checkpoint.every=2", "evaluate.clips=0"]
    return subprocess.Popen(
        runs.command(folder, overrides, ranks=2),
        cwd=runs.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=runs.LIMIT) == 0


def kill(process: subprocess.Popen[bytes], whom: str) -> None:
    """SIGKILL to torchrun, to one rank, or to all; the rest must go by itself."""
    ranks = children(process.pid)
    if whom == "a rank" and ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[-1], signal.SIGKILL)
    else:
        for pid in [process.pid, *(ranks if whom == "everything" else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank outlived its run"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.timeout(600)
def test_killed_at_ten_random_moments_ends_as_if_undisturbed(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    finish(start(calm))
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(stormy)
        already = lines(stormy)
        deadline = time.monotonic() + 60
        # a moment counted from the first new iteration on, or, one time in five, from the start
        if moments.random() > 0.2:
            while lines(stormy) == already and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 1.0))
        kill(process, moments.choice(("everything", "torchrun", "a rank")))
    finish(start(stormy))
    runs.assert_same_checkpoint(
        runs.checkpoint(calm, ITERATIONS, tmp_path), runs.checkpoint(stormy, ITERATIONS, tmp_path)
    )
    assert [row["iteration"] for row in runs.metrics(stormy)] == list(range(ITERATIONS))
    for one, other in zip(runs.metrics(calm), runs.metrics(stormy), strict=True):
        assert one["reward/sum"] == other["reward/sum"]


def test_a_kill_while_saving_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the run at each point of a save: the newest published folder is always whole."""
    folder = tmp_path / "run"
    runs.succeed(folder, ["run.iterations=2"])
    for crash in ("after writing", "after renaming"):
        damaged = folder / "checkpoints" / "step-3"
        partial = folder / "checkpoints" / "step-3.partial"
        if crash == "after writing":  # parts, and no manifest
            partial.mkdir()
            (partial / "__0_0.distcp").write_bytes(b"half")
        else:  # published, and `latest` still names the one before
            (folder / "checkpoints" / "latest").write_text("step-2\n")
        out = runs.succeed(folder, ["run.iterations=3"])
        assert damaged.is_dir() and not partial.exists()
        assert f"resumed from checkpoint step-{2 if crash == 'after writing' else 3}" in out


def test_no_space_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """On a small file system of its own, which needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        folder = disk / "run"
        runs.succeed(folder, ["run.iterations=1", "evaluate.clips=0"])
        filler = disk / "filler"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(max(free - 5_000_000, 0)))
        line = runs.complaint(folder, ["run.iterations=2", "evaluate.clips=0"])
        assert "checkpoint step-2 could not be" in line and "free space there and start again" in line
        assert not list((folder / "checkpoints").glob("*.partial"))
        filler.unlink()
        out = runs.succeed(folder, ["run.iterations=2", "evaluate.clips=0", "checkpoint.keep=1"])
        assert "resumed from checkpoint step-1" in out
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.succeed(folder, ["run.iterations=5", "checkpoint.keep=2"])
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    rewards = [row["reward/sum"] for row in runs.metrics(folder)]
    best = f"step-{max(range(5), key=rewards.__getitem__) + 1}"
    assert kept == {"step-4", "step-5", best}
    assert checkpoint.Progress().iteration == 0


def test_another_number_of_ranks_and_another_mesh_go_on_alike(tmp_path: Path) -> None:
    """Saved on two ranks, continued on two, on one and on a mesh of four: the next iterations draw the same clips."""
    runs.succeed(tmp_path / "2", ["run.iterations=1"], ranks=2)
    for name in ("1", "4"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
    for ranks, settings in ((2, []), (1, []), (4, ["distributed.shard=2", "distributed.sp=2"])):
        out = runs.succeed(tmp_path / str(ranks), ["run.iterations=3", *settings], ranks=ranks)
        assert "resumed from checkpoint step-1" in out
    expected = runs.metrics(tmp_path / "2")
    for name in ("1", "4"):
        rows = runs.metrics(tmp_path / name)
        assert len(rows) == len(expected) == 3
        for row, other in zip(rows, expected, strict=True):
            assert abs(row["reward/sum"] - other["reward/sum"]) <= 1e-4
            assert row["update/max_log_ratio_first"] <= 1e-6
