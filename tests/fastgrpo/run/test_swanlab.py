"""SwanLab beside metrics.jsonl: its real client where it is installed, and a stand-in for what a
test cannot ask of the real one.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.run.tracker import Tracker, read_metrics
from fastgrpo.run.tracking.swanlab_run import SwanLab
from fastgrpo.tools.check import check

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import signal, sys
from pathlib import Path
import torch
from fastgrpo.run.tracker import Tracker
from fastgrpo.run.tracking.swanlab_run import SwanLab
folder, start, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mine, hook = signal.getsignal(signal.SIGINT), sys.excepthook
wanted = SwanLab(project="p", config={"a": {"b": None, "c": [1, 2]}})
with Tracker(folder, True, 6, start) as tracked:
    tracked.send_to_swanlab(wanted)
    assert signal.getsignal(signal.SIGINT) is mine and sys.excepthook is hook
    for iteration in range(start, end):
        tracked.log(iteration, {"reward/sum": 0.5 + iteration, "seconds/total": 2.0})
    clips = torch.randint(0, 255, (2, 3, 16, 16, 3), dtype=torch.uint8)
    tracked.videos(end - 1, name="heldout", clips=clips, captions=["a", "b"], fps=8.0)
    tracked.summary({"heldout_after/sum": 1.25})
assert signal.getsignal(signal.SIGINT) is mine and sys.excepthook is hook
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB")}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | variables


def history(folder: Path) -> dict[int, dict[str, float]]:
    """Steps and numbers in SwanLab's own file, read by its own reader."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = folder.glob("*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    found: dict[int, dict[str, float]] = {}
    for content in reader:
        record = Record()
        record.ParseFromString(content)
        if record.HasField("scalar"):
            scalar = record.scalar
            found.setdefault(scalar.step, {})[scalar.key] = scalar.value.number
    return found


def test_offline_it_holds_the_same_numbers_and_continues_its_run(tmp_path: Path) -> None:
    pytest.importorskip("swanlab")
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    for start, end in ((0, 4), (2, 6)):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(run), str(start), str(end)],
            env=environment(home),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("swanlab: offline; upload later with: swanlab sync ")
        assert "Tracking run" not in done.stdout  # its own lines would tear a live display
    assert list(home.rglob("*")) == []  # nothing outside the run's folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "run"]
    first, second = sorted((run / "swanlab").glob("run-*"))
    run_id = (run / "swanlab_id.txt").read_text().strip()
    assert {first.name.rpartition("-")[2], second.name.rpartition("-")[2]} == {run_id}
    found = history(first) | history(second)
    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) == 6
    for row in rows:
        logged = found[int(row["iteration"])]
        assert logged["reward/sum"] == row["reward/sum"]
        assert logged["seconds/total"] == row["seconds/total"]
    assert len(list((second / "media").rglob("*.gif"))) == 2


class Client:
    """Stands for the module swanlab: what it was asked for, and how it answers."""

    def __init__(
        self, mode: str = "online", key: str | None = None, project: str | None = None
    ) -> None:
        self.users = types.SimpleNamespace(
            mode=mode,
            api_key=key,
            run=types.SimpleNamespace(id=None),
            project=types.SimpleNamespace(name=project, workspace=None),
            experiment=types.SimpleNamespace(name=None),
        )
        self.asked: list[dict[str, Any]] = []
        self.unreachable = self.broken = False

    def module(self) -> types.ModuleType:
        client = self

        class Settings:
            Terminal: ClassVar[Any] = dict
            Probe: ClassVar[Any] = dict

            def __new__(cls, **chosen: object) -> Any:
                return chosen or client.users

        module = types.ModuleType("swanlab")
        module.Settings = Settings  # type: ignore[attr-defined]
        module.init = self.init  # type: ignore[attr-defined]
        return module

    def init(self, **asked: Any) -> "Client":
        self.asked.append(asked)
        print("swanlab: hello")
        signal.signal(signal.SIGINT, lambda number, frame: None)
        if self.unreachable and asked["mode"] == "online":
            raise RuntimeError("no such host\nand more")
        return self

    @property
    def mode(self) -> str:
        return self.asked[-1]["mode"]

    dir = Path("there")

    def log(self, values: dict[str, float], step: int) -> None:
        if self.broken:
            raise BrokenPipeError("its service has ended")

    def finish(self) -> None:
        pass


def track(
    client: Client, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Two iterations with a stand-in.  returns what was shown"""
    patch.setitem(sys.modules, "swanlab", client.module())
    patch.delenv("SWANLAB_LOG_DIR", raising=False)
    mine = signal.getsignal(signal.SIGINT)
    with Tracker(folder, True, 2) as tracked:
        tracked.send_to_swanlab(SwanLab(project="ours", entity="lab"))
        assert signal.getsignal(signal.SIGINT) is mine
        for iteration in range(2):
            tracked.log(iteration, {"reward/sum": 1.0})
    assert len(read_metrics(folder / "metrics.jsonl")) == 2
    return capsys.readouterr().out


def test_without_a_key_the_run_is_kept_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client()
    shown = track(client, tmp_path / "run", monkeypatch, capsys)
    (asked,) = client.asked
    assert asked["mode"] == "offline" and asked["log_dir"] == str(tmp_path / "run" / "swanlab")
    assert (asked["project"], asked["workspace"], asked["name"]) == ("ours", "lab", "run")
    assert asked["id"] == (tmp_path / "run" / "swanlab_id.txt").read_text().strip()
    assert shown.startswith("swanlab: offline; upload later") and "hello" not in shown


def test_the_users_settings_go_before_our_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(mode="local", project="mine")
    track(client, tmp_path / "run", monkeypatch, capsys)
    assert client.asked[0]["mode"] == "local" and client.asked[0]["project"] is None
    disabled = Client(mode="disabled", key="k")
    track(disabled, tmp_path / "other", monkeypatch, capsys)
    assert disabled.asked == []


def test_a_key_without_a_way_out_is_a_run_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(key="k")
    client.unreachable = True
    shown = track(client, tmp_path / "run", monkeypatch, capsys).splitlines()
    assert [asked["mode"] for asked in client.asked] == ["online", "offline"]
    assert shown[0] == "swanlab: no such host"
    assert shown[1] == "swanlab: offline; upload later with: swanlab sync there"


def test_its_failure_in_mid_run_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(mode="local")
    client.broken = True
    shown = track(client, tmp_path / "run", monkeypatch, capsys)
    assert shown.count("swanlab: its service has ended; the run goes on without it") == 1


def test_a_setting_that_it_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(ValueError):
        def errors(self) -> list[dict[str, Any]]:
            return [{"loc": ("mode",), "input": "sometimes", "msg": "Invalid mode"}]

    class Settings:
        def __init__(self) -> None:
            raise Refused

    module = types.ModuleType("swanlab")
    module.Settings = Settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", module)
    with (
        Tracker(tmp_path / "run", True, 2) as tracked,
        pytest.raises(UserError, match=r"^SWANLAB_MODE=sometimes: Invalid mode; correct it"),
    ):
        tracked.send_to_swanlab(SwanLab(project="p"))


def test_clips_are_shown_to_whoever_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A panel of as many GIFs as clips, gone from the run's folder afterwards."""
    shown: list[Any] = []

    class Listening(Client):
        def log(self, values: dict[str, Any], step: int) -> None:
            shown.append((values, step))

    client = Listening(mode="local")
    module = client.module()
    module.Video = lambda file, caption: (Path(file).read_bytes()[:6], caption)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", module)
    with Tracker(tmp_path / "run", True, 2) as tracked:
        tracked.send_to_swanlab(SwanLab(project="p"))
        clips = torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)
        tracked.videos(1, name="heldout", clips=clips, captions=["a", "b"], fps=8.0)
    assert shown == [({"videos/heldout": [(b"GIF89a", "a"), (b"GIF89a", "b")]}, 1)]
    assert not list((tmp_path / "run").glob("videos-*"))


def test_a_folder_that_takes_no_clips_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one on a disk that is full."""
    monkeypatch.setitem(sys.modules, "swanlab", Client(mode="local").module())
    with Tracker(tmp_path / "run", True, 2) as tracked:
        tracked.send_to_swanlab(SwanLab(project="p"))
        tracked.run_dir = tmp_path / "gone"
        clips = torch.zeros(1, 3, 16, 16, 3, dtype=torch.uint8)
        tracked.videos(1, name="heldout", clips=clips, captions=["a"], fps=8.0)
    assert "swanlab: [Errno 2]" in capsys.readouterr().out


def test_check_names_the_extra_of_a_client_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = config.load(ROOT / "launch" / "t2v_tiny.toml", ["track.swanlab=true"])
    monkeypatch.setitem(sys.modules, "swanlab", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys.modules[name])
    with pytest.raises(UserError, match=r"pip install 'fastgrpo\[swanlab\]', or set it to false"):
        check._check_trackers(recipe)
