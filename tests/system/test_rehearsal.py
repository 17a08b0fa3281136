"""The rehearsal itself: it compiles, two jobs are right, and planted faults are found."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.harness.folders.launch_files import LAUNCH
from tests.rehearsal import compare, jobs
from tests.rehearsal.cuda import build
from tests.rehearsal.cuda.causes import Cause
from tests.rehearsal.plants import PLANTS

obstacle = build.obstacle()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(obstacle is not None, reason=obstacle or ""),
]


def rehearse(folder: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Run `python -m tests.rehearsal`.  returns exit code, what it printed, what it found"""
    told = folder / "told.json"
    command = [sys.executable, "-m", "tests.rehearsal", *arguments, "--json", str(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert told.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr, json.loads(told.read_text())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was found with each fault, and in `unplanted` without one."""
    _, _, told = rehearse(tmp_path_factory.mktemp("plants"), "--plants")
    return told


def test_it_compiles_once() -> None:
    before = build.build()
    assert before.stat().st_size > 100_000
    changed = before.stat().st_mtime_ns
    assert build.build() == before and before.stat().st_mtime_ns == changed


def test_two_jobs_are_right(tmp_path: Path) -> None:
    code, said, told = rehearse(tmp_path, "fsdp", "background")
    assert code == 0, said
    assert all(found["wrong"] == [] for found in told.values())


def test_nothing_is_found_without_a_fault(planted: dict[str, Any]) -> None:
    assert planted[jobs.UNPLANTED]["wrong"] == []


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(name: str, planted: dict[str, Any]) -> None:
    found = planted[name]["wrong"]
    assert any(PLANTS[name].found in line for line in found), found


def test_preflight_has_the_rewards_beside_a_second_batch(planted: dict[str, Any]) -> None:
    """One that fits beside the first batch alone would end the first iteration."""
    (line,) = planted["heavy_reward"]["wrong"]
    assert "newest checkpoint" not in line  # as training would say it


def test_there_are_thirteen_faults_and_every_launch_file_is_a_job() -> None:
    assert len(PLANTS) == 13 + 1
    names = [job.name for job in jobs.table()]
    assert len(names) == len(set(names))
    assert {*LAUNCH, "t2v_tiny", *jobs.MESHES} <= set(names)


def test_every_job_has_a_golden_list_and_every_list_a_job() -> None:
    names = {job.name for job in jobs.table() if not (job.cpu or job.rounds)}
    assert {file.stem for file in compare.GOLDEN.glob("*.txt")} == names


def test_a_list_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "GOLDEN", tmp_path)
    counts = {
        Cause("sync", "item", "a.py", "f", 3): 2,
        Cause("sync", "item", "a.py", "f", 9): 1,
        Cause("collective", "all_reduce nccl", "b.py", "C.g", 1): 4,
    }
    compare.write_golden("job", counts)
    golden = compare.read_golden("job")
    assert golden is not None and golden == compare.by_function(counts)
    assert compare.differences(counts, golden) == []
    more = counts | {
        Cause("sync", "item", "b.py", "C.g", 7): 1,
        Cause("sync", "item", "a.py", "f", 3): 3,
    }
    del more[Cause("collective", "all_reduce nccl", "b.py", "C.g", 1)]
    assert compare.differences(more, golden) == [
        "more: sync item, a.py:3 f, 4 times and not 3",
        "new: sync item, b.py:7 C.g, 1 times",
        "gone: collective all_reduce nccl, b.py:0 C.g",
    ]
