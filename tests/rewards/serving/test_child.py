"""The server beside the trainer: its death is told at once, and it is started again."""

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.core.errors import UserError
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.server import child
from fastgrpo.rewards.serving.server.child import ServerProcess, launch_beside
from tests.harness.servers import CAPTIONS, clips, same

pytestmark = pytest.mark.slow  # real servers that are killed

ADDRESS = re.compile(r"127\.0\.0\.1|http://")


def process(folder: Path) -> int:
    pid: int = json.loads((folder / "reward_server.json").read_text())["pid"]
    return pid


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_server_is_told_at_once_and_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with launch_beside([plain("tiny_world")], tmp_path, outage_s=60.0) as (url, token):
        with RewardClient([url], token, ["tiny_world"], outage_s=60.0) as client:
            client.call_beside(tmp_path / "reward_server.log")
            before = client.score(clips(), CAPTIONS, 8.0)
            first = process(tmp_path)
            os.kill(first, signal.SIGKILL)
            until(lambda: "beside the trainer: killed by SIGKILL" in caplog.text, 1.0)
            assert same(client.score(clips(), CAPTIONS, 8.0), before)
            second = process(tmp_path)
            os.kill(second, signal.SIGTERM)  # also where somebody ends it in good order
            until(lambda: "killed by SIGTERM" in caplog.text)
            assert same(client.score(clips(), CAPTIONS, 8.0), before)
        assert len({first, second, process(tmp_path)}) == 3
        last = process(tmp_path)
    until(lambda: not Path(f"/proc/{last}").exists(), 1.0)  # and by its end it is over
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("memory runs out" in one and str(tmp_path) in one for one in said)
    assert sum("takes requests again" in one for one in said) == 2
    assert not any(ADDRESS.search(one) for one in said)


@pytest.mark.slow
def test_a_server_that_cannot_come_back_is_given_up_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "reward_server.log"
    with launch_beside([plain("tiny_world")], tmp_path, outage_s=1.0) as (url, token):
        with RewardClient([url], token, ["tiny_world"], outage_s=1.0) as client:
            client.call_beside(log)
            client.score(clips(), CAPTIONS, 8.0)
            monkeypatch.setattr(child, "TOKEN_VARIABLE", "NOT_THE_TOKEN")  # so it cannot start
            os.kill(process(tmp_path), signal.SIGKILL)
            with pytest.raises(
                UserError,
                match=rf"^reward server beside the trainer: no scores for 1 s .*{re.escape(str(log))}",
            ) as raised:
                client.score(clips(), CAPTIONS, 8.0)
            assert not ADDRESS.search(str(raised.value))
        until(lambda: "it is not started again" in caplog.text)
    assert "exited with code 1: token='': the reward server needs one" in caplog.text


def test_last_words_are_the_present_processs_and_no_note(tmp_path: Path) -> None:
    server = ServerProcess([plain("tiny_world")], tmp_path, 10.0)
    server.log_file.write_text("Segmentation fault of an earlier run\n")
    server._log_begin = server.log_file.stat().st_size
    with server.log_file.open("a") as log:
        log.write('{"level": "INFO", "message": "loaded"}\n')
    assert server.last_words() == "no last words"
    with server.log_file.open("a") as log:
        log.write('{"level": "ERROR", "message": "a batch failed", "error": "KeyError"}\n')
        log.write('{"level": "INFO", "message": "request"}\n')
    assert server.last_words() == "a batch failed KeyError"
    with server.log_file.open("a") as log:
        log.write("RuntimeError: no kernel image\n")
    assert server.last_words() == "RuntimeError: no kernel image"


def test_a_server_that_is_late_is_ended_and_told(tmp_path: Path) -> None:
    server = ServerProcess([plain("tiny_world")], tmp_path, 0.01)
    with pytest.raises(UserError, match=r"not ready within 0\.01 s.*raise server\.start_timeout_s"):
        server.start()
    server.stop()
