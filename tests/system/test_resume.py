"""Checkpoints that a killed save left are passed over, the newest and best are kept, and any mesh
goes on from them.
"""

import shutil
from pathlib import Path

from fastgrpo.checkpoint import checkpoints
from tests.harness import runs

INSIDE = ("rewards.0.where=process",)


def test_a_kill_while_saving_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """Stop the run at each point of a save: the newest published folder is always whole."""
    folder = tmp_path / "run"
    runs.succeed(folder, [*INSIDE, "run.iterations=2"])
    for crash in ("after writing", "after renaming"):
        damaged = folder / "checkpoints" / "step-3"
        partial = folder / "checkpoints" / "step-3.partial"
        if crash == "after writing":  # parts, and no manifest
            partial.mkdir()
            (partial / "__0_0.distcp").write_bytes(b"half")
        else:  # published, and `latest` still names the one before
            (folder / "checkpoints" / "latest").write_text("step-2\n")
        out = runs.succeed(folder, [*INSIDE, "run.iterations=3"])
        assert damaged.is_dir() and not partial.exists()
        assert (folder / "checkpoints" / "latest").read_text() == "step-3\n"
        assert f"resumed from checkpoint step-{2 if crash == 'after writing' else 3}" in out


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.succeed(folder, [*INSIDE, "run.iterations=5", "checkpoint.keep=2"])
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    rewards = [row["reward/sum"] for row in runs.metrics(folder)]
    best, before = (f"step-{max(range(n), key=rewards.__getitem__) + 1}" for n in (5, 4))
    # no sample was drawn with the last one's weights: where it is the best, so is the one before
    assert kept == {"step-4", "step-5", best} | ({before} if best == "step-5" else set())
    assert checkpoints.Progress().iteration == 0


def test_another_number_of_ranks_and_another_mesh_go_on_alike(tmp_path: Path) -> None:
    """Saved on two ranks, continued on two, on one and on a mesh of four: the next iterations draw
    the same clips.
    """
    runs.succeed(tmp_path / "2", [*INSIDE, "run.iterations=1"], ranks=2)
    for name in ("1", "4"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
    for ranks, settings in ((2, []), (1, []), (4, ["distributed.shard=2", "distributed.sp=2"])):
        out = runs.succeed(
            tmp_path / str(ranks), [*INSIDE, "run.iterations=3", *settings], ranks=ranks
        )
        assert "resumed from checkpoint step-1" in out
    expected = runs.metrics(tmp_path / "2")
    for name in ("1", "4"):
        rows = runs.metrics(tmp_path / name)
        assert len(rows) == len(expected) == 3
        for row, other in zip(rows, expected, strict=True):
            assert abs(row["reward/sum"] - other["reward/sum"]) <= 1e-4
            assert row["update/max_log_ratio_first"] <= 1e-6
