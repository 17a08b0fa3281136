"""Checkpoints from elsewhere: pickles that would run code are refused and not run."""

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from fastgrpo.checkpoint import reader
from fastgrpo.checkpoint.stored_state import StoredState, ValuesWithoutCode
from fastgrpo.cli.main import main
from fastgrpo.core.errors import UserError
from tests.harness import runs

pytestmark = pytest.mark.slow  # whole runs


class RunsCode:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration."""
    place = tmp_path_factory.mktemp("kept") / "run"
    assert main(runs.arguments(place, [*runs.SMALLER, "prompts.limit=4", "run.iterations=1"])) == 0
    return place


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def test_metadata_reads_as_pytorch_reads_it(kept: Path) -> None:
    checkpoint = kept / "checkpoints" / "step-1"
    ours, theirs = (kind(checkpoint).read_metadata() for kind in (StoredState, FileSystemReader))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data and ours.planner_data == theirs.planner_data


@pytest.mark.parametrize("command", ["export", "sample", "train"])
def test_code_in_the_metadata_of_a_foreign_run_is_not_run(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, trace = run / "checkpoints" / "step-1", tmp_path / "trace"
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data["x"] = RunsCode(trace)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    runs.write_manifest(checkpoint)
    arguments = {
        "export": ["export", str(run), str(tmp_path / "out")],
        "sample": ["sample", str(run), "--out", str(tmp_path / "out")],
        "train": runs.arguments(run, [*runs.SMALLER, "prompts.limit=4", "run.iterations=1"]),
    }
    assert main(arguments[command]) == 2
    said = capsys.readouterr().err
    assert ".metadata cannot be read (it names " in said and said.count("fastgrpo: ") == 1
    assert not trace.exists() and "Traceback" not in said


def test_code_in_a_value_beside_the_tensors_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    dcp.save({"lr": 1.0}, checkpoint_id=tmp_path / "step", no_dist=True)
    with (tmp_path / "step" / ".metadata").open("rb") as file:
        place = pickle.load(file).storage_data[MetadataIndex("lr")]
    content = io.BytesIO()
    torch.save(RunsCode(trace), content)
    part = tmp_path / "step" / place.relative_path
    part.write_bytes(content.getvalue())
    metadata = StoredState(tmp_path / "step").read_metadata()
    assert isinstance(metadata.state_dict_metadata["lr"], BytesStorageMetadata)
    place.length = len(content.getvalue())
    metadata.storage_data[MetadataIndex("lr")] = place
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(dcp.api.CheckpointException, match=r"weights_only|Weights only"):
        dcp.load(
            {"lr": 0.0},
            storage_reader=StoredState(tmp_path / "step"),
            planner=ValuesWithoutCode(),
            no_dist=True,
        )
    assert not trace.exists()


def test_a_place_outside_the_folder_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "step-1" / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"__0_0.distcp", b"../../x.dist"))
    runs.write_manifest(file.parent)
    with pytest.raises(UserError, match=r"names the file '../../x.dist', which is not in its"):
        reader.find(run, "newest")
