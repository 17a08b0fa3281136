"""Tracking: one JSON line per iteration that survives kills and resumes, what a person sees, and
wandb's own file.
"""

import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from fastgrpo.core.errors import UserError
from fastgrpo.run.terminal import BLOCKS, dashboard, duration, trend
from fastgrpo.run.tracker import Tracker, keep_before, read_metrics
from fastgrpo.run.tracking.wandb_run import Wandb, WandbRun, has_wandb_key
from tests import ROOT

METRICS = {
    "reward/sum": 2.1134,
    "reward/VQ": 0.714,
    "reward/MQ": 0.66,
    "reward/TA": 0.7394,
    "reward/invalid": 0.0,
    "group_std/VQ": 0.1,
    "update/max_log_ratio_first": 1.5e-7,
    "update/grad_norm": 0.83,
    "update/clip_fraction": 0.125,
    "seconds/rollout": 2.04,
    "seconds/decode": 0.6,
    "seconds/reward": 0.12,
    "seconds/update": 5.2,
    "seconds/total": 8.1,
    "lr": 1e-4,
}


def tracker(
    folder: Path, total: int = 90, start: int = 0, terminal: bool = False
) -> tuple[Tracker, io.StringIO]:
    """A tracker whose output can be read."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100)
    return Tracker(folder, True, total, start, console=console), output


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_iteration_is_one_json_line_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracked, _ = tracker(tmp_path / "run")
    tracked.log(0, METRICS)
    assert lines(tmp_path / "run")[0].items() >= METRICS.items()  # before close
    tracked.log(1, METRICS | {"reward/sum": math.nan})
    tracked.close()
    first, second = lines(tmp_path / "run")
    assert first["iteration"] == 0
    assert second["time"] >= first["time"] > 1.7e9
    assert second["reward/sum"] is None  # strict JSON has no NaN
    assert math.isnan(read_metrics(tmp_path / "run" / "metrics.jsonl")[1]["reward/sum"])


def test_a_resumed_run_has_every_iteration_once(tmp_path: Path) -> None:
    with tracker(tmp_path)[0] as first:
        for i in range(7):
            first.log(i, {"reward/sum": float(i)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "time": 17000')  # killed while writing
    with tracker(tmp_path, start=5)[0] as second:  # the newest checkpoint is older than the kill
        assert [row["iteration"] for row in lines(tmp_path)] == [0, 1, 2, 3, 4]
        for i in range(5, 9):
            second.log(i, {"reward/sum": 10.0 + i})
    assert [row["iteration"] for row in lines(tmp_path)] == list(range(9))
    assert [row["reward/sum"] for row in lines(tmp_path)] == [0, 1, 2, 3, 4, 15, 16, 17, 18]


def test_kept_lines_are_kept_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"iteration": 0, "x": 0.1000}\n{"iteration": 0, "heldout/sum": 1}\n{"iteration": 1, "x": null}'
    path.write_text(text)  # a whole last line, only its end of line is missing
    assert len(keep_before(path, 2)) == 3
    assert path.read_text() == text + "\n"
    assert keep_before(path, 0) == []
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("broken", ["{", "[]", '{"time": 1}', '{"iteration": 1, "x": "a"}'])
def test_a_broken_line_inside_the_file_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{broken}\n{{"iteration": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(path)


HELD_OUT = {
    "heldout/sum": 2.2,
    "heldout/VQ": 0.8,
    "heldout/grid": 0.01234,
    "heldout_change/sum": 0.31,
    "heldout_low/sum": 0.1,
    "heldout_high/sum": 0.52,
}


def test_iterations_that_are_done_again_lose_their_lines(tmp_path: Path) -> None:
    tracked, _ = tracker(tmp_path)
    for iteration in range(3):
        tracked.log(iteration, METRICS)
    tracked.log(1, HELD_OUT)
    assert tracked.has(1, "heldout/sum") and not tracked.has(2, "heldout/sum")
    tracked.rewind(1)
    tracked.log(1, METRICS)
    tracked.close()
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert not tracked.has(1, "heldout/sum")


def test_the_plain_line_says_it_all(tmp_path: Path) -> None:
    tracked, output = tracker(tmp_path)
    tracked.message("resumed from checkpoint [step-11]")
    tracked.log(11, METRICS)
    tracked.log(11, HELD_OUT)
    tracked.log(11, {"other/number": 2.25})
    tracked.log(12, METRICS | {"reward/invalid": 3.0, "seconds/wait": 0.01}, "slow: rank 5")
    tracked.close()
    assert output.getvalue().splitlines() == [
        "resumed from checkpoint [step-11]",
        "iteration 12/90  reward 2.113 (VQ 0.71 MQ 0.66 TA 0.74)"
        "  8.1 s (rollout 2.0 decode 0.6 reward 0.1 update 5.2)  eta 11 min",
        "iteration 12/90  held-out 2.200 (+0.310, +0.100 .. +0.520)  VQ 0.8 grid 0.0123",
        "iteration 12/90  other number 2.25",
        "iteration 13/90  reward 2.113 (VQ 0.71 MQ 0.66 TA 0.74)"
        "  8.1 s (rollout 2.0 decode 0.6 reward 0.1 update 5.2)  eta 10 min  invalid scores: 3  "
        "slow: rank 5",
    ]


def test_a_terminal_gets_a_live_display(tmp_path: Path) -> None:
    tracked, output = tracker(tmp_path / "t2v", terminal=True)
    for i in range(20):
        tracked.log(i, METRICS | {"reward/sum": 1.0 + i / 10, "reward/VQ": 2.0 - i / 10})
    tracked.message("saved step-20")
    tracked.close()
    shown = Console(width=100, file=io.StringIO(), record=True)
    note = "slow: rank 5 (node n1) took 1.9x the median in rollout"
    shown.print(dashboard(read_metrics(tmp_path / "t2v" / "metrics.jsonl"), 90, "t2v", note))
    text = " ".join(shown.export_text().split())
    assert "saved step-20" in output.getvalue() and note in text
    assert "iteration 20/90" in text
    assert "sum 2.900 +1.500" in text  # means of the last and the first five iterations
    assert "VQ 0.100 -1.500" in text
    assert "max |log ratio| 1.5e-07 grad norm 0.83 clipped 12.5% invalid 0" in text
    assert "rollout 2.0 s ■ decode 0.6 s ■ reward 0.1 s ■ update 5.2 s iteration 8.1 s" in text
    assert "left 9 min" in text  # 70 iterations of 8.1 s


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(
        tmp_path / "run",
        main=False,
        total_iterations=10,
        start_iteration=0,
        wandb=Wandb(project="p"),
    ) as tracked:
        tracked.log(0, METRICS)
        tracked.message("no")
        tracked.videos(
            0,
            name="heldout",
            clips=torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8),
            captions=["a"],
            fps=8.0,
        )
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (45, "45 s"),
        (540, "9 min"),
        (7500, "2 h 05 min"),
        (276_000, "3 d 5 h"),
        (math.nan, "?"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_trend_rises_with_the_values() -> None:
    assert trend([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 32) == BLOCKS
    assert trend([1.0] * 100, 10) == "▁" * 10
    assert trend([float(i // 10) for i in range(80)], 8) == BLOCKS


def test_a_key_for_wandb_is_looked_for_where_wandb_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine wandb.example login user password made-up\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://elsewhere.example")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert has_wandb_key()


UNREACHABLE_RUN = """
import sys
from pathlib import Path
from fastgrpo.run.tracker import Tracker
from fastgrpo.run.tracking.wandb_run import Wandb
with Tracker(Path(sys.argv[1]), True, 1, 0, Wandb(project="p")) as tracked:
    tracked.log(0, {"reward/sum": 0.5})
    tracked.summary({"heldout_after/sum": 1.25})
"""


def test_a_key_without_a_way_out_is_a_run_kept_offline(tmp_path: Path) -> None:
    """Compute nodes of many clusters have the user's netrc and no internet: that must not end a
    run.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "XDG", "NETRC"))
    }
    nobody = {
        "WANDB_API_KEY": 40 * "a",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "3",
    }
    environment = kept | nobody | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNREACHABLE_RUN, str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert "wandb: offline; upload later with: wandb sync" in done.stdout
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert offline_history(folder)[0]["reward/sum"] == 0.5
    assert [row["reward/sum"] for row in lines(tmp_path / "run")] == [0.5]


WANDB_RUN = """
import sys
from pathlib import Path
import torch
from fastgrpo.run.tracker import Tracker
from fastgrpo.run.tracking.wandb_run import Wandb
start, end = int(sys.argv[2]), int(sys.argv[3])
with Tracker(Path(sys.argv[1]), True, 6, start, Wandb(project="p", config={"seed": 7})) as tracked:
    for i in range(start, end):
        tracked.log(i, {"reward/sum": i / 3, "seconds/total": 2.0 + i})
    clips = torch.zeros(2, 3, 32, 32, 3, dtype=torch.uint8)
    tracked.videos(end - 1, "heldout", clips, ["a red circle", "a blue square"], 8.0)
"""


def offline_history(folder: Path) -> dict[int, dict[str, object]]:
    """Steps and numbers in wandb's own file: LevelDB's log format around protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    history: dict[int, dict[str, object]] = {}
    (file,) = folder.glob("*.wandb")
    data, at, record = file.read_bytes(), 7, b""  # a header of 7 bytes
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record's header straddles two blocks
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            message = Record()
            message.ParseFromString(record)
            record = b""
            if message.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in message.history.item
                }
                history[message.history.step.num] = items
    return history


def test_wandb_offline_holds_the_same_numbers_and_continues_its_run(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "XDG", "NETRC"))
    }
    environment = kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    for start, end in ((0, 4), (2, 6)):
        command = [sys.executable, "-c", WANDB_RUN, str(run), str(start), str(end)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "wandb: offline; upload later with: wandb sync" in done.stdout
    assert list(home.rglob("*")) == []  # nothing outside the run's folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "run"]
    first, second = sorted(
        (run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime
    )
    run_id = (run / "wandb_id.txt").read_text().strip()
    assert {first.name.rpartition("-")[2], second.name.rpartition("-")[2]} == {run_id}
    history = offline_history(first) | offline_history(second)
    assert len(lines(run)) == 6
    for row in lines(run):
        logged = history[int(row["iteration"])]
        assert (logged["reward/sum"], logged["seconds/total"]) == (
            row["reward/sum"],
            row["seconds/total"],
        )
    assert history[5]["videos/heldout/captions"] == ["a red circle", "a blue square"]
    assert len(list((second / "files" / "media").rglob("*.mp4"))) >= 1


class Counting(BaseHTTPRequestHandler):
    """Counts what is sent to it, and lets nobody in."""

    seen: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append(f"{self.command} {self.path}")
        self.send_response(401)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Counting.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("variables", "settings", "kept"),
    [
        ({"WANDB_MODE": "offline"}, "", True),
        ({"WANDB_MODE": "dryrun"}, "", True),
        ({}, "[default]\nmode = offline\n", True),  # by `wandb offline`
        ({"WANDB_MODE": "disabled"}, "", False),
        ({}, "[default]\nmode = disabled\n", False),
    ],
)
def test_nothing_is_sent_where_the_user_said_offline(
    tmp_path: Path, server: str, variables: dict[str, str], settings: str, kept: bool
) -> None:
    """Though a key and a server are at hand."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(settings)
    done = in_its_own_process(
        tmp_path, {"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": server, **variables}
    )
    assert done.returncode == 0, done.stderr
    assert Counting.seen == []
    assert [row["reward/sum"] for row in lines(tmp_path / "run")] == [0.5]
    assert bool(list((tmp_path / "run").glob("wandb/offline-run-*"))) == kept
    assert ("wandb: offline; upload later" in done.stdout) == kept


def in_its_own_process(
    folder: Path, variables: dict[str, str], before: str = ""
) -> subprocess.CompletedProcess[str]:
    """One iteration in folder/run with these variables of wandb's and no others."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB", "XDG", "NETRC"))
    }
    environment = kept | {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", before + UNREACHABLE_RUN, str(folder / "run")]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=150
    )


def test_the_users_variables_of_wandb_go_before_our_arguments(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_RUN_ID": "mine",
        "WANDB_PROJECT": "my-project",
        "WANDB_ENTITY": "my-team",
        "WANDB_NAME": "my-name",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
    }
    done = in_its_own_process(tmp_path, variables)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "elsewhere" / "wandb").glob("offline-run-*-mine")
    written = next(folder.glob("*.wandb")).read_bytes()
    for value in (b"my-project", b"my-team", b"my-name"):
        assert value in written
    # an attempt without the variable goes on with the same run
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == "mine\n"


def test_a_variable_that_wandb_refuses_is_one_line(tmp_path: Path) -> None:
    done = in_its_own_process(tmp_path, {"WANDB_MODE": "sometimes"})
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fastgrpo.core.errors.UserError: WANDB_MODE=sometimes: Input should be")


def test_wandbs_failure_in_mid_run_is_told_once_and_ends_nothing() -> None:
    class Gone:
        settings = type("Settings", (), {"mode": "online"})

        def log(self) -> None:
            raise BrokenPipeError("its service has ended\nand more")

    told: list[str] = []
    run = WandbRun(Gone(), told.append)
    for _ in range(3):
        run.attempt(lambda run: run.log())
    assert told == ["wandb: its service has ended; the run goes on without it"]


NOBODY = """
import os, pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
del os.environ["HOME"]
"""


def test_a_user_without_a_home_and_a_name_keeps_the_run_offline(tmp_path: Path) -> None:
    done = in_its_own_process(tmp_path, {}, before=NOBODY)
    assert done.returncode == 0, done.stderr
    assert "wandb: offline; upload later" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
