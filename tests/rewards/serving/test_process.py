"""The server's process: how it ends, its ready file, its memory, and what it tells of its safety."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.server import logs
from fastgrpo.rewards.serving.server.process import forget, serve
from fastgrpo.training.scoring.sources import read_token
from tests import ROOT
from tests.harness.servers import CAPTIONS, TOKEN, clips, post, running

SLOW = """
import time
import torch
from fastgrpo.core.reward import Reward, Scores

class Slow(Reward):
    names = ("A",)

    def __call__(self, pixels, prompts, fps):
        time.sleep(2.0 if pixels.shape[2] < 32 else 0.0)
        return Scores({"A": torch.ones(len(prompts))}, torch.ones(len(prompts)) > 0)

def load(spec):
    return Slow()
"""
SERVER = """
import sys
from pathlib import Path
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving.server.admission import Limits
from fastgrpo.rewards.serving.server.process import serve
limits = Limits(drain_s=3, batch_wait_s=0.0)
serve([plain(sys.argv[2])], "127.0.0.1", 0, sys.stdin.read(), Path(sys.argv[1]), limits)
"""


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A slow server of its own process, and its url."""
    (folder / "slow.py").write_text(SLOW)
    ready = folder / "ready.json"
    ready.write_text(json.dumps({"url": "http://nowhere", "pid": 1}))  # of one that was killed
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(ready), str(folder / "slow.py")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as child:
        assert child.stdin is not None
        child.stdin.write(TOKEN.encode())
        child.stdin.close()
        deadline = time.monotonic() + 60.0
        while not ready.exists() or json.loads(ready.read_text())["pid"] != child.pid:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        try:
            yield json.loads(ready.read_text())["url"], child
        finally:
            child.kill()


@pytest.mark.slow
def test_what_takes_longer_than_draining_may_is_sent_to_another(tmp_path: Path) -> None:
    """Four requests of two seconds each, and three seconds to drain: some are scored, others 503."""
    bodies = [
        wire.encode_request([torch.zeros(1, n, 8, 3, dtype=torch.uint8)], ["p"], 8.0, ["slow"])
        for n in range(1, 5)  # of shapes of their own: one after the other
    ]
    with server(tmp_path) as (url, child), ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(post, url, body) for body in bodies]
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        answers = [one.result() for one in waiting]
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 503}, statuses
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
        child.wait(10.0)
        assert not (tmp_path / "ready.json").exists()


def test_only_its_own_ready_file_is_removed_at_the_end(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text(json.dumps({"url": "http://x:1", "pid": 1}))
    forget(ready, pid=2)
    assert ready.exists()
    forget(ready, pid=1)
    assert not ready.exists()
    ready.write_text("of an earlier server")
    with pytest.raises(UserError, match="no such reward"):
        serve([plain("tiny_word")], "127.0.0.1", 0, TOKEN, ready)
    assert not ready.exists()
    forget(ready)


def test_an_address_for_other_machines_is_told_to_have_no_tls(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "start", lambda: None)
    for host, told in (("127.0.0.1", False), ("0.0.0.0", True)):
        caplog.clear()
        with pytest.raises(UserError, match="no such reward"):
            serve([plain("tiny_word")], host, 0, TOKEN, None)
        assert ("without TLS" in caplog.text) is told


@pytest.mark.parametrize(
    ("mode", "said"), [(0o600, ""), (0o644, "may read it"), (0o666, "may read and change it")]
)
def test_a_token_that_others_may_read_or_change_is_told(
    mode: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token.txt"
    file.write_text("secret")
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert read_token(file) == "secret"
    assert said in caplog.text and bool(caplog.text) is bool(said)
    assert "secret" not in caplog.text


class Hungry(Reward):
    """Declares a MiB for each clip, and notes how many it is given."""

    names = ("A",)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def memory(self, frames: int, height: int, width: int) -> float:
        return 2.0**20 if height == 32 else 2.0**40

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.batches.append(len(prompts))
        return Scores({"A": torch.ones(len(prompts))}, torch.ones(len(prompts)) > 0)


def test_a_judges_memory_bounds_its_batches_and_its_clips() -> None:
    reward = Hungry()
    with (
        running({"hungry": reward}, max_working=3 * 2**20, wait_s=0.2) as url,
        RewardClient([url], TOKEN, ["hungry"]) as client,
    ):
        assert client.score(clips(), CAPTIONS, 8.0)["hungry"].valid.all()
        assert reward.batches == [3, 3]
        with pytest.raises(UserError, match=r"413: .*takes 1048576 MiB to judge a clip of"):
            client.score(clips()[:, :, :16], CAPTIONS, 8.0)
    assert reward.batches == [3, 3]


@pytest.mark.parametrize("shape", [(9, 64, 64), (4, 128, 128)])
def test_the_tiny_worlds_judge_takes_about_what_it_declares(shape: tuple[int, int, int]) -> None:
    """Against the peak of all that numpy asks for."""
    reward = load(plain("tiny_world"))
    clip = torch.randint(0, 256, (1, *shape, 3), dtype=torch.uint8)
    tracemalloc.start()
    try:
        reward(clip, CAPTIONS[:1], 8.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 * reward.memory(*shape) < peak < reward.memory(*shape)
