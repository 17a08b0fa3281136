"""Whole runs: the recipe, the reward server, two ranks, what the run folder holds, and users'
mistakes.
"""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from fastgrpo.core import files
from tests import ROOT
from tests.harness import forks, runs

INSIDE = ("rewards.0.where=process",)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with the reward behind the server, started as a person does."""
    folder = tmp_path_factory.mktemp("served") / "run"
    out = runs.succeed(folder, run=runs.started)
    assert "held-out reward, before and after training" in out and "iteration 3/3" in out
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with the reward inside."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.succeed(folder, INSIDE)
    return folder


def test_a_run_leaves_all_its_parts_in_its_folder(served: Path) -> None:
    summary = json.loads((served / "summary.json").read_text())
    assert summary["iterations"] == 3 and summary["wall_seconds"] > 0
    for key in ("before", "after", "difference", "ci95"):
        assert set(summary[key]) == {"sum", "VQ", "MQ", "TA"}
    for part in ("sum", "VQ", "MQ", "TA"):
        assert summary["difference"][part] == pytest.approx(
            summary["after"][part] - summary["before"][part], abs=1e-6
        )
        low, high = summary["ci95"][part]
        assert low <= summary["difference"][part] <= high
    rows = runs.metrics(served)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["update/max_log_ratio_first"] <= 1e-6 < row["update/grad_norm"]
        assert row["update/transitions"] == 2 * 4 * 3
        assert row["reward/sum"] == pytest.approx(
            row["reward/VQ"] + row["reward/MQ"] + row["reward/TA"], abs=1e-5
        )
    assert (served / "report.html").stat().st_size > 10_000
    assert (served / "evaluation" / "step-3" / "001.mp4").is_file()
    assert sorted(
        path.name for path in (served / "checkpoints").iterdir() if "best" not in path.name
    ) >= ["latest"]
    assert (served / "checkpoints" / "latest").read_text() == "step-3\n"
    assert not list(served.rglob("*.partial"))


def test_process_and_server_give_equal_runs(finished: Path, served: Path, tmp_path: Path) -> None:
    assert (served / "reward_server.log").exists() and not (finished / "reward_server.log").exists()
    (tmp_path / "inside").mkdir()
    runs.assert_same_checkpoint(
        runs.checkpoint(served, 3, tmp_path), runs.checkpoint(finished, 3, tmp_path / "inside")
    )


def test_two_ranks_draw_the_trajectories_of_one(finished: Path, tmp_path: Path) -> None:
    runs.succeed(tmp_path / "two", INSIDE, ranks=2, run=runs.started)
    one, two = runs.metrics(finished), runs.metrics(tmp_path / "two")
    assert two[0]["reward/sum"] == pytest.approx(one[0]["reward/sum"], abs=1e-4)
    assert two[0]["update/grad_norm"] == pytest.approx(one[0]["update/grad_norm"], rel=1e-3)
    assert all(row["update/max_log_ratio_first"] <= 1e-6 for row in two)


def test_a_finished_run_started_again_changes_nothing(finished: Path, tmp_path: Path) -> None:
    before = runs.checkpoint(finished, 3, tmp_path)
    out = runs.succeed(finished, INSIDE)
    assert "resumed from checkpoint step-3" in out
    runs.assert_same_checkpoint(before, runs.checkpoint(finished, 3, tmp_path))


def test_best_of_n_and_kl_run(tmp_path: Path) -> None:
    overrides = [
        *INSIDE,
        "objective.best_of_n=2",
        "objective.kl_weight=0.01",
        "optimizer.updates_per_iteration=1",
    ]
    runs.succeed(tmp_path / "run", [*overrides, "run.iterations=2"], ranks=2)
    for row in runs.metrics(tmp_path / "run"):
        assert row["update/transitions"] == 2 * 2 * 3
        assert row["update/kl"] >= 0


def test_a_run_folder_of_another_recipe_is_refused(finished: Path) -> None:
    line = runs.complaint(finished, [*INSIDE, "optimizer.eps=1e-7", "run.seed=4"])
    assert "holds a run of another recipe (optimizer.eps: " in line
    assert "-> 1e-07; run.seed: 0 -> 4)" in line
    assert "holds a run already" in runs.complaint(finished, [*INSIDE, "run.resume=never"])


def test_sharded_rollout_offload_and_saving_in_the_background_end_alike(
    finished: Path, tmp_path: Path
) -> None:
    """Also where a rank has no clip to evaluate: one prompt, one seed, two ranks."""
    settings = [*INSIDE, "distributed.rollout_weights=sharded", "distributed.offload=true"]
    one = ["evaluate.prompts=1", "evaluate.clips=1"]
    runs.succeed(tmp_path / "run", [*settings, "checkpoint.background=true", *one], ranks=2)
    for row, other in zip(runs.metrics(tmp_path / "run"), runs.metrics(finished), strict=True):
        assert row["reward/sum"] == pytest.approx(other["reward/sum"], abs=1e-4)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-3\n"


def test_an_outage_beyond_the_limit_saves_what_was_trained(tmp_path: Path) -> None:
    folder, ready, token = tmp_path / "run", tmp_path / "ready.json", tmp_path / "token"
    token.write_text("a token of at least sixteen characters")
    serve = [
        "serve-rewards",
        "tiny_world",
        "--port",
        "0",
        "--ready-file",
        str(ready),
        "--token-file",
        str(token),
    ]
    server = forks.start("fastgrpo.cli", serve)
    deadline = time.monotonic() + 120
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    settings = [
        f"server.urls=['{json.loads(ready.read_text())['url']}']",
        f"server.token_file={token}",
    ]
    settings += [
        "server.outage_s=1",
        "server.request_timeout_s=2",
        "run.iterations=200",
        "checkpoint.every=1000",
    ]
    run = forks.start("fastgrpo.cli", runs.arguments(folder, settings), errors=tmp_path / "told")
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    server.kill()
    code, told = run.wait(120), (tmp_path / "told").read_text()
    assert code == 2 and "no scores for 1 s" in told, told
    done = len(runs.metrics(folder))
    assert done >= 1 and (folder / "checkpoints" / "latest").read_text() == f"step-{done}\n"


def test_a_flipped_byte_is_named_and_the_checkpoint_before_taken(
    finished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    part = next((copy / "checkpoints" / "step-3").glob("*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    out = runs.succeed(copy, INSIDE)
    assert (
        f"checkpoint step-3 is damaged ({part.name} is not what was written): set aside as "
        "step-3.damaged" in out
    )
    assert "resumed from checkpoint step-2" in out
    runs.assert_same_checkpoint(
        runs.checkpoint(finished, 3, tmp_path), runs.checkpoint(copy, 3, tmp_path)
    )


def test_a_run_without_an_intact_checkpoint_names_the_files(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    cut, gone = (
        next((copy / "checkpoints" / name).glob("*.distcp")) for name in ("step-3", "step-2")
    )
    size = cut.stat().st_size
    os.truncate(cut, size - 7)
    gone.unlink()
    for other in (copy / "checkpoints").glob("step-1*"):
        shutil.rmtree(other)
    line = runs.complaint(copy, INSIDE)
    assert f"{cut.name} has {size - 7} bytes instead of {size}; {gone.name} is missing" in line
    assert {path.name for path in (copy / "checkpoints").glob("step-*")} == {
        "step-3.damaged",
        "step-2.damaged",
    }


def test_mistakes_in_prompts_counts_and_servers_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin1.txt").write_bytes(
        "a red circle moves left slowly\nein gr\xfcner Kreis\n".encode("latin-1")
    )
    (tmp_path / "token").write_text("wrong\n")
    folder = tmp_path / "run"
    cases = {
        f"prompts.train={tmp_path / 'empty.txt'}": "the file has no prompts",
        f"prompts.train={tmp_path / 'latin1.txt'}": "line 2 is not UTF-8",
        f"prompts.train={tmp_path / 'none.txt'}": "no such file",
        f"model.path={tmp_path}": "model_index.json is missing",
        "video.frames=8": "use 5 or 9",
        "rollout.stepz=3": "did you mean 'rollout.steps'?",
    }
    for override, message in cases.items():
        assert message in runs.complaint(folder, [override])
        assert not (folder / "recipe.toml").exists(), "half-written run folder"
    missing = ["rewards.0.name=tiny_wold"]
    assert "no such reward. Did you mean tiny_world? Use one" in runs.complaint(folder, missing)
    assert "tiny_world has no part 'XQ'" in runs.complaint(folder, ["rewards.0.weights={XQ=1.0}"])
    unreachable = ["server.urls=['http://127.0.0.1:9']", f"server.token_file={tmp_path / 'token'}"]
    assert "http://127.0.0.1:9" in runs.complaint(
        folder, [*unreachable, "server.start_timeout_s=2"]
    )
    assert not (folder / "recipe.toml").exists(), "half-written run folder"


def impatient(rank: int) -> None:
    files.PATIENCE_S = 0.2


def test_a_second_trainer_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = runs.arguments(tmp_path / "run", INSIDE)
        assert (
            forks.start("fastgrpo.cli", command, errors=tmp_path / "told", first=impatient).wait(60)
            == 2
        )
    assert "another process is training there" in (tmp_path / "told").read_text()


def test_an_edited_prompt_file_is_noticed_on_resume(finished: Path, tmp_path: Path) -> None:
    copy, edited = tmp_path / "copy", tmp_path / "heldout.txt"
    shutil.copytree(finished, copy)
    heldout = ROOT / "data" / "tiny_world_heldout.txt"
    edited.write_text(heldout.read_text().replace("red", "blue", 1))
    told = runs.complaint(copy, [*INSIDE, f"prompts.heldout={edited}"])
    assert "prompts.heldout: the file has changed since" in told
