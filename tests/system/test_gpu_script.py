"""`python -m benchmarks.gpu` on a CPU: what is cut or missing is a line; the plan reads it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import hunyuan, schedule
from benchmarks.gpu.report import Report, table
from benchmarks.gpu.schedule import STAGES, Setup
from benchmarks.plan.check import job
from benchmarks.speed import ratio_bias
from fastgrpo.cli import main as cli
from fastgrpo.core import config
from fastgrpo.tools.plan.costs import compute
from tests import ROOT
from tests.harness.runs import RECIPE

HIDDEN = "raise ImportError(\"No module named 'diffusers'\")\n"
SLEEPER = """
import pathlib, subprocess, sys, time
from benchmarks.gpu.report import Report
told = Report(pathlib.Path(sys.argv[1]), "a stage")
told.row("before", 1.5, "s")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
told.row("child", child.pid)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of the stages that take seconds."""
    folder = tmp_path_factory.mktemp("gpu")
    assert command.main(["--small", "--only", "a,ratio,f", "--out", str(folder)]) == 0
    return folder


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages that were run, by name."""
    told = json.loads((folder / "results.json").read_text())["stages"]
    return {stage["name"]: stage for stage in told}


def value(stage: dict[str, Any], what: str) -> Any:
    (found,) = (row["value"] for row in stage["rows"] if row["what"] == what)
    return found


def test_the_stages_that_were_asked_for_end_and_are_written(results: Path) -> None:
    done = read(results)
    assert list(done) == ["machine", "ratio", "determinism"]
    assert {stage["outcome"] for stage in done.values()} == {"ended"}
    assert value(done["machine"], "matrix product, bfloat16") > 0
    assert value(done["determinism"], "deterministic: single block: the same bits") is True
    text = (results / "table.txt").read_text()
    assert all(stage["title"] in text for stage in done.values())


def test_the_bias_is_of_other_batches_alone_and_never_after(results: Path) -> None:
    rows = [row for row in read(results)["ratio"]["rows"] if row["unit"] == "-mean(z^2)/2"]
    # a card's own kernels, with two batch sizes more; a CPU's are emulated
    assert len(rows) == (8 if torch.cuda.is_available() else 6)
    for row in rows:
        assert row["note"].endswith("with the update's own: 0")
        if "batches 1/1" in row["what"]:
            assert row["value"] == 0
        elif ", all," in row["what"]:
            assert -1 < row["value"] < -1e-6
    assert ratio_bias.beyond(0.0, ratio_bias.CLIP_RANGE) == pytest.approx(0.3173, abs=1e-4)
    assert ratio_bias.beyond(-2e-4, 0.0) == 1.0 and ratio_bias.beyond(-1e-5, 0.0) == 0.0


def test_the_plan_reads_the_calibration(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = results / "calibration.json"
    numbers = json.loads(file.read_text())["numbers"]
    of_card = {"host_gbs"} if torch.cuda.is_available() else set()
    assert set(numbers) == {"tflops", "memory_gib", "memory_gbs", "memory"} | of_card
    seconds = []
    for more in ([], ["--calibration", str(file)]):
        assert cli.main(["plan", str(RECIPE), "--gpus", "1", "--gpu", "h100", "--json", *more]) == 0
        phases = json.loads(capsys.readouterr().out)["phases"]
        seconds.append({phase["name"]: phase["seconds"] for phase in phases}["rollout"])
    assert seconds[1] / seconds[0] == pytest.approx(989 / numbers["tflops"], rel=1e-3)


def test_a_cut_stage_and_a_missing_library_are_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "diffusers.py").write_text(HIDDEN)
    paths = os.pathsep.join([str(hidden), str(ROOT)])
    monkeypatch.setattr(schedule, "_environment", lambda: os.environ | {"PYTHONPATH": paths})
    words = ["--small", "--only", "a,f", "--limit", "a=0.05", "--out", str(tmp_path / "out")]
    assert command.main(words) == 1
    done = read(tmp_path / "out")
    assert done["machine"]["outcome"] == "cut at 0 s" and done["machine"]["seconds"] < 5
    assert done["determinism"]["outcome"] == "ended"
    missing = [row for row in done["determinism"]["rows"] if row["what"] == "plain: blocks"]
    assert [row["note"] for row in missing] == ["missing: No module named 'diffusers'"]
    assert value(done["determinism"], "plain: patch embedding: the same bits") is True


def test_a_stage_is_killed_with_what_it_started_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path, small=True)
    words = [sys.executable, "-c", SLEEPER, str(setup.file("machine"))]
    monkeypatch.setattr(schedule, "command", lambda stage, setup: words)
    begun = time.monotonic()
    found = schedule.run(STAGES[0], setup, 5.0)
    assert time.monotonic() - begun < 30
    assert found["outcome"] == "cut at 5 s"
    assert found["rows"][0] == {"what": "before", "value": 1.5, "unit": "s", "note": ""}
    assert "before" in table([found])
    ends = time.monotonic() + 10  # the kernel takes its time
    while alive(found["rows"][1]["value"]) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(found["rows"][1]["value"])


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_error_is_a_row_and_the_stage_goes_on(tmp_path: Path) -> None:
    told = Report(tmp_path / "stage.json", "a stage")
    with told.attempt("what fails"):
        raise RuntimeError("\n  first line\nsecond line")
    told.row("what works", True)
    told.calibrate(rollout=1.02, tflops=700.123456)
    assert [row["note"] for row in told.rows] == ["RuntimeError: first line", ""]
    assert told.numbers == {"rollout": 1.0, "tflops": 700.1}


@pytest.mark.parametrize("words", [["--only", "a,x"], ["--limit", "x=1"], ["--limit", "a=soon"]])
def test_mistakes_are_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*words, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_blocks_flops_are_the_plans() -> None:
    size = hunyuan.size(small=False)
    recipe = config.load(ROOT / "launch" / "t2v_hunyuan.toml")
    of = job(recipe, size.config, (16, *size.latent), size.text, 1)
    flops = compute.forward(of, 1, of.network.blocks)
    each = size.block_flops
    assert flops.attention == pytest.approx(60 * each[1], rel=1e-6)
    assert flops.products == pytest.approx(60 * each[0], rel=1e-3)
