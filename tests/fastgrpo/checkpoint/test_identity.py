"""Whose checkpoint it is: foreign ones are refused, the run's own records are made again."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from fastgrpo.checkpoint import identity, reader
from fastgrpo.core import config
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import only_run_in
from fastgrpo.tools.export.export import Export, export
from fastgrpo.tools.sample.source import Asked, find
from fastgrpo.train import train
from tests.harness import runs

pytestmark = pytest.mark.slow  # whole runs


def recipe(place: Path, *overrides: str) -> Recipe:
    small = [*runs.SMALL, *runs.SMALLER, "prompts.limit=4", f"run.dir={place}"]
    return config.load(runs.RECIPE, [*small, *overrides])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at its end."""
    place = tmp_path_factory.mktemp("kept") / "run"
    assert train(recipe(place)) is not None
    return place


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def test_each_checkpoint_carries_the_run_and_what_it_began_with(kept: Path) -> None:
    own = json.loads((kept / "identity.json").read_text())
    assert own["newest"] == "step-2" and len(own["run"]) == 16
    for checkpoint in reader.published(kept / "checkpoints"):
        carried = identity.of_checkpoint(checkpoint)
        assert carried is not None and carried.run == own["run"]
        for name, text in carried.files.items():
            assert (kept / name).read_text() == text
        assert set(carried.files) == {identity.RECIPE, *identity.RESTORED}


def test_a_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train(recipe(other, "run.iterations=3", "run.seed=7")) is not None
    shutil.copytree(other / "checkpoints" / "step-3", run / "checkpoints" / "step-3")
    with pytest.raises(UserError, match=r"checkpoints/step-3 is of another run \(\w{16}\) than"):
        train(recipe(run, "run.iterations=4"))
    assert (run / "checkpoints" / "step-3").is_dir()
    (run / "identity.json").unlink()  # then the checkpoints among themselves
    with pytest.raises(UserError, match="is of another run"):
        train(recipe(run, "run.iterations=4"))


def test_a_recipe_that_waited_for_the_folder_is_compared_once_it_has_it(
    kept: Path, tmp_path: Path
) -> None:
    """The first run finishes an iteration while the second waits, and is gone then."""
    place = tmp_path / "run"
    place.mkdir()
    first = only_run_in(place)
    first.__enter__()

    def finish() -> None:
        time.sleep(1.5)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        first.__exit__(None, None, None)

    thread = threading.Thread(target=finish)
    thread.start()
    with pytest.raises(UserError, match=r"holds a run of another recipe .*run\.seed: 0 -> 7"):
        train(recipe(place, "run.seed=7"))
    thread.join()


def test_an_edited_recipe_in_the_folder_does_not_let_another_in(run: Path) -> None:
    file = run / "recipe.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 7"))
    with pytest.raises(UserError, match=r"holds a run of another recipe .*run\.seed: 0 -> 7"):
        train(recipe(run, "run.seed=7"))


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step-*"])
def test_a_folder_that_has_lost_its_checkpoints_does_not_begin_anew(run: Path, what: str) -> None:
    metrics = (run / "metrics.jsonl").read_bytes()
    for path in list(run.glob(what)):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"checkpoints/ has none, and step-2 was saved there"):
        train(recipe(run, "run.iterations=3"))
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_edited_scores_are_not_compared(
    run: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "evaluation" / "step-0.json"
    scores = json.loads(file.read_text())
    scores["scores"]["VQ"] = [0.0]
    file.write_text(json.dumps(scores))
    summary = train(recipe(run))
    assert summary is not None
    assert summary["before"] == json.loads((kept / "summary.json").read_text())["before"]
    assert "evaluation/step-0.json was missing or not what the run wrote" in capsys.readouterr().out


def test_checkpoints_of_a_version_without_identities_load(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "identity.json").unlink()
    for checkpoint in reader.published(run / "checkpoints"):
        (checkpoint / "run.json").unlink()
        runs.write_manifest(checkpoint)
    assert train(recipe(run, "run.iterations=3")) is not None
    assert "resumed from checkpoint step-2" in capsys.readouterr().out
    newest = reader.published(run / "checkpoints")[0]
    carried = identity.of_checkpoint(newest)
    assert newest.name == "step-3" and carried is not None
    assert carried.run == identity.of_folder(run)


@pytest.mark.parametrize("edit", ["empty", "without the shard"])
def test_a_manifest_that_leaves_files_out_vouches_for_nothing(
    edit: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoints" / "step-2"
    shard, manifest = checkpoint / "__0_0.distcp", checkpoint / "manifest.json"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    entries = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps({} if edit == "empty" else {k: v for k, v in entries.items() if k != shard.name})
    )
    with pytest.raises(UserError, match=r"manifest\.json does not name"):
        reader.find(run, "newest")
    assert train(recipe(run)) is not None
    out = capsys.readouterr().out
    assert "checkpoint step-2 is damaged (manifest.json does not name" in out
    assert "resumed from checkpoint step-1" in out


def test_a_shard_of_the_right_size_is_not_read_by_tools_where_its_content_differs(
    run: Path,
) -> None:
    shard = run / "checkpoints" / "step-2" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"__0_0\.distcp is not what was written; choose another"):
        reader.find(run, "newest")
    assert reader.find(run, 1).name == "step-1"


def test_an_edited_recipe_of_a_run_is_named_with_its_file(run: Path) -> None:
    """By every command that reads it, not only as a key that nobody typed."""
    file = run / identity.RECIPE
    file.write_text(file.read_text().replace("max_kl", "may_kl"))
    for read in (
        lambda: train(recipe(run)),
        lambda: export(Export(run, run / "exported")),
        lambda: find(Asked(str(run))),
        lambda: find(Asked(str(run), overrides=("run.seed=1",))),
    ):
        with pytest.raises(UserError) as refused:
            read()
        assert str(refused.value) == (
            f"{file}: not as the run wrote it (Unknown key 'objective.may_kl'; did you mean "
            "'objective.max_kl'?); restore the file. Where the folder has a checkpoint, remove it: "
            "training makes it again."
        )
    file.unlink()
    assert train(recipe(run)) is not None and "max_kl" in file.read_text()
