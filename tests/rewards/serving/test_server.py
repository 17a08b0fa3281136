"""The reward server over loopback: real uvicorn, real bytes, and everything that may go wrong on
the way.
"""

import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastgrpo.cli import main as cli
from fastgrpo.cli import options
from fastgrpo.cli.serve import serve_rewards
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards import load, plain
from fastgrpo.rewards.common import weight_files
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from fastgrpo.rewards.serving.server.child import launch_beside
from fastgrpo.rewards.serving.server.process import serve
from tests import ROOT
from tests.harness.servers import CAPTIONS, TOKEN, clips, post, running, same


class Raising(Reward):
    names = ("A",)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        if pixels.shape[2] == 32:
            raise KeyError(f"secret {prompts[0]}")
        return Scores({"A": torch.ones(len(prompts))}, torch.ones(len(prompts), dtype=torch.bool))


class Strange(Reward):
    """Claims that all are valid: a NaN, an infinity, and every kind of finite float32."""

    names = ("A", "B")
    given = torch.tensor([math.nan, math.inf, 1 / 3, -0.0, 1e-45, 3.4028235e38])

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        return Scores({"A": self.given, "B": torch.arange(6.0)}, torch.ones(6, dtype=torch.bool))


class Slow(Reward):
    names = ("A",)

    def __init__(self) -> None:
        self.under_way = 0
        self.most = 0

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        time.sleep(0.2)
        self.under_way -= 1
        return Scores({"A": torch.ones(len(prompts))}, torch.ones(len(prompts), dtype=torch.bool))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    folder = tmp_path_factory.mktemp("run")
    with launch_beside([plain("tiny_world")], folder) as (url, token):
        yield url, token, folder


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    with running({"tiny_world": load(plain("tiny_world"))}) as url:
        yield url


# ---- scores


def test_server_and_process_agree_bit_for_bit(beside: tuple[str, str, Path]) -> None:
    url, token, _ = beside
    prompts = [*CAPTIONS[:5], "not of this world"]
    inside = ScorerInProcess([plain("tiny_world")]).score(clips(), prompts, 8.0)
    with RewardClient([url], token, ["tiny_world"]) as client:
        client.wait_ready(10.0)
        whole = client.score(clips(), prompts, 8.0)
        with ThreadPoolExecutor(4) as threads:  # one clip at a time, from several threads at once
            ones = list(
                threads.map(
                    lambda i: client.score(clips()[i : i + 1], prompts[i : i + 1], 8.0), range(6)
                )
            )
    assert same(whole, inside)
    assert inside["tiny_world"].valid.tolist() == [True] * 5 + [False]
    for part, values in inside["tiny_world"].values.items():
        joined = torch.cat([one["tiny_world"].values[part] for one in ones])
        assert torch.equal(joined.view(torch.int32), values.view(torch.int32))


def test_large_batches_go_as_several_requests(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastgrpo.rewards.serving.client.client.REQUEST_BYTES", 2 * clips()[0].numel() + 1
    )
    sent: list[int] = []
    encode = wire.encode_request

    def counted(
        some: Sequence[Tensor], prompts: Sequence[str], fps: float, names: Sequence[str], **at: Any
    ) -> bytes:
        sent.append(len(some))
        return encode(some, prompts, fps, names, **at)

    monkeypatch.setattr(wire, "encode_request", counted)
    with RewardClient([tiny], TOKEN, ["tiny_world"]) as client:
        parts = client.score(clips()[:5], CAPTIONS[:5], 8.0)
    assert sent == [2, 2, 1]
    assert same(parts, ScorerInProcess([plain("tiny_world")]).score(clips()[:5], CAPTIONS[:5], 8.0))


def test_raising_reward_makes_its_clips_invalid(caplog: pytest.LogCaptureFixture) -> None:
    pixels = [clips()[0], torch.zeros(2, 8, 8, 3, dtype=torch.uint8)]
    body = wire.encode_request(pixels, CAPTIONS[:2], 8.0, ["raising", "tiny_world"])
    rewards = {"raising": Raising(), "tiny_world": load(plain("tiny_world"))}
    with running(rewards) as url, caplog.at_level(logging.WARNING):
        answer = post(url, body).json()
    assert answer["scores"]["raising"]["A"] == [None, 1.0] and answer["valid"]["raising"] == [
        False,
        True,
    ]
    # two frames are too few for it; the first clip is scored
    assert answer["valid"]["tiny_world"] == [
        True,
        False,
    ]
    assert "Raising raised KeyError" in caplog.text and "secret" not in caplog.text


def test_scores_that_are_not_finite_are_missing_and_others_keep_their_bits() -> None:
    with running({"strange": Strange()}) as url, RewardClient([url], TOKEN, ["strange"]) as client:
        result = client.score(clips(), CAPTIONS, 8.0)["strange"]
    assert result.valid.all(), (
        "each has its B, and which part is trained on is the trainer's affair"
    )
    assert result.values["A"].isnan().tolist() == [True, True, False, False, False, False]
    assert (
        result.values["A"][2:].view(torch.int32).tolist()
        == Strange.given[2:].view(torch.int32).tolist()
    )
    assert result.values["B"].tolist() == list(range(6))


def test_one_request_is_scored_at_a_time_while_the_server_answers() -> None:
    slow = Slow()
    with (
        running({"slow": slow}) as url,
        RewardClient([url], TOKEN, ["slow"]) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        jobs = [threads.submit(client.score, clips(), CAPTIONS, 8.0) for _ in range(4)]
        time.sleep(0.1)
        assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
        assert not all(job.done() for job in jobs)  # answered meanwhile: not on the event loop
        assert all(job.result()["slow"].valid.all() for job in jobs)
    assert slow.most == 1


# ---- refusals


def test_wrong_token_is_refused_before_the_body_is_read(tiny: str) -> None:
    host, port = tiny.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer x\r\nContent-Length: 99999\r\n\r\n"
        connection.sendall(head.encode())  # and no byte of the body
        assert connection.recv(100).startswith(b"HTTP/1.1 401")
    assert httpx.get(f"{tiny}/v1/spec", trust_env=False).status_code == 401
    with RewardClient([tiny], "wrong", ["tiny_world"]) as client:
        for call in (lambda: client.score(clips(), CAPTIONS, 8.0), lambda: client.wait_ready(60.0)):
            start = time.monotonic()
            with pytest.raises(UserError, match=r"server.token_file: wrong token for http://127"):
                call()
            assert time.monotonic() - start < 5.0


def test_body_limits(tiny: str) -> None:
    assert post(tiny, bytes(2**20 + 1)).status_code == 413
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": wire.CONTENT_TYPE}
    chunked = httpx.post(
        f"{tiny}/v1/score", content=iter([b"abc"]), headers=headers, trust_env=False
    )
    assert chunked.status_code == 411
    assert post(tiny, b"{}", **{"Content-Type": "application/json"}).status_code == 415
    host, port = tiny.removeprefix("http://").split(":")
    with socket.create_connection(
        (host, int(port)), timeout=10
    ) as connection:  # a body that never comes
        lines = [
            f"{name}: {value}"
            for name, value in ({"Host": host, "Content-Length": "99"} | headers).items()
        ]
        connection.sendall(("\r\n".join(["POST /v1/score HTTP/1.1", *lines]) + "\r\n\r\n").encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    with RewardClient([tiny], TOKEN, ["tiny_world"]) as client:
        big = torch.zeros(1, 9, 256, 256, 3, dtype=torch.uint8)
        with pytest.raises(UserError, match="refused with status 413"):
            client.score(big, CAPTIONS[:1], 8.0)


def test_too_much_waiting_is_turned_away_and_tried_again() -> None:
    body = wire.encode_request(list(clips()), CAPTIONS, 8.0, ["slow"])
    with (
        running({"slow": Slow()}, max_waiting=len(body) + 1) as url,
        ThreadPoolExecutor(4) as threads,
    ):
        answers = list(threads.map(lambda _: post(url, body), range(4)))
        assert {a.status_code for a in answers} == {200, 429}
        assert all("retry-after" in a.headers for a in answers if a.status_code == 429)
        with RewardClient([url], TOKEN, ["slow"]) as client:
            jobs = [threads.submit(client.score, clips(), CAPTIONS, 8.0) for _ in range(3)]
            assert all(job.result()["slow"].valid.all() for job in jobs)


def test_a_request_waits_for_room_with_its_body_unread() -> None:
    body = wire.encode_request(list(clips()), CAPTIONS, 8.0, ["slow"])
    rewards: dict[str, Reward] = {"slow": Slow()}
    with (
        running(rewards, max_waiting=len(body) + 1, room_wait_s=5.0) as url,
        ThreadPoolExecutor(6) as threads,
    ):
        assert all(
            answer.status_code == 200 for answer in threads.map(lambda _: post(url, body), range(6))
        )
        metrics = httpx.get(
            f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False
        ).text
        assert "reward_bytes_in_flight 0.0" in metrics  # what was let in was let out


def test_unknown_reward_is_named(tiny: str) -> None:
    with RewardClient([tiny], TOKEN, ["tiny_world", "hps"]) as client:
        for call in (lambda: client.wait_ready(10.0), lambda: client.score(clips(), CAPTIONS, 8.0)):
            with pytest.raises(UserError, match="has no reward 'hps', only tiny_world"):
                call()
    answer = post(tiny, wire.encode_request(list(clips()[:1]), CAPTIONS[:1], 8.0, ["hps"]))
    assert answer.status_code == 422 and "no reward 'hps' here" in answer.text


def header_of(body: bytes) -> dict[str, dict[str, object]]:
    (length,) = struct.unpack("<Q", body[:8])
    header: dict[str, dict[str, object]] = json.loads(body[8 : 8 + length])
    return header


def with_header(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def malformed() -> dict[str, bytes]:
    """Bodies that differ from a good one in one point each."""
    good = wire.encode_request(list(clips()[:2]), CAPTIONS[:2], 8.0, ["tiny_world"])
    (length,) = struct.unpack("<Q", good[:8])
    data = good[8 + length :]
    size = clips()[0].numel()

    def changed(entry: str, **fields: object) -> bytes:
        header = header_of(good)
        return with_header(header | {entry: header[entry] | fields}, data)

    def asked(**fields: object) -> bytes:
        request = {"prompts": CAPTIONS[:2], "fps": 8.0, "rewards": ["tiny_world"]} | fields
        return changed("__metadata__", request=json.dumps(request))

    text = json.dumps(header_of(good))
    return {
        "empty": b"",
        "short": good[:5],
        "cut": good[:-1],
        "longer": good + b"x",
        "header beyond the body": struct.pack("<Q", 2**63) + good[8:],
        "header over its cap": with_header(b" " * (wire.MAX_HEADER + 1), b""),
        "pickle": b"\x80\x04" + bytes(100),
        "no json": with_header(b"{" * 50, data),
        "deep json": with_header(b"[" * 100_000, data),
        "no object": with_header([1], data),
        "a key twice": with_header(('{"clip.0": {},' + text[1:]).encode(), data),
        "no metadata": with_header(
            {k: v for k, v in header_of(good).items() if k != "__metadata__"}, data
        ),
        "no request": changed("__metadata__", request=3),
        "float tensor": changed("clip.0", dtype="F32"),
        "three dimensions": changed("clip.0", shape=[9, 32, 96]),
        "negative": changed("clip.0", shape=[-9, -32, 32, 3]),
        "no frames": changed("clip.0", shape=[0, 32, 32, 3], data_offsets=[0, 0]),
        "four channels": changed("clip.0", shape=[9, 32, 24, 4]),
        "huge": changed("clip.0", shape=[2**40, 32, 32, 3], data_offsets=[0, 2**40 * 32 * 32 * 3]),
        "true for 1": changed("clip.0", shape=[True, 9 * 32, 32, 3]),
        "overlap": changed("clip.1", data_offsets=[0, size]),
        "gap": changed("clip.1", data_offsets=[size + 1, 2 * size + 1]),
        "gap inside": changed("clip.0", shape=[8, 32, 32, 3], data_offsets=[0, 8 * 32 * 32 * 3]),
        "behind the end": changed("clip.1", data_offsets=[2**40, 2**40 + size]),
        "other name": with_header(
            {k.replace("clip.1", "clip.7"): v for k, v in header_of(good).items()}, data
        ),
        "too few prompts": asked(prompts=CAPTIONS[:1]),
        "no prompts": asked(prompts=[]),
        "prompt is a number": asked(prompts=[CAPTIONS[0], 3]),
        "prompt is no Unicode text": asked(prompts=[CAPTIONS[0], "\ud800"]),
        "reward is no Unicode text": asked(rewards=["\ud800"]),
        "no rewards": asked(rewards=[]),
        "reward twice": asked(rewards=["tiny_world", "tiny_world"]),
        "fps 0": asked(fps=0),
        "fps true": asked(fps=True),
        "fps infinite": asked(fps=math.inf),
    }


def test_malformed_bodies_are_refused(tiny: str) -> None:
    for what, body in malformed().items():
        assert post(tiny, body).status_code in (400, 413), what
    good = wire.encode_request(list(clips()[:2]), CAPTIONS[:2], 8.0, ["tiny_world"])
    assert post(tiny, good).status_code == 200  # and the server is as well as before


def test_a_body_damaged_anywhere_in_its_header_never_fails_otherwise() -> None:
    good = wire.encode_request([clips()[0, :1, :2, :2]], ["é a red circle"], 8.0, ["tiny_world"])
    (length,) = struct.unpack("<Q", good[:8])
    rng = np.random.default_rng(0)
    for _ in range(3000):
        body = bytearray(good)
        for position in rng.integers(0, 8 + length, rng.integers(1, 4)):
            body[position] = rng.integers(0, 256)
        try:
            wire.decode_request(body)
        except wire.WireError:
            continue


def test_request_is_plain_safetensors() -> None:
    pixels = [clips()[0], clips()[1, :2, :8, :16]]
    body = wire.encode_request(pixels, ["a", "ü 红"], 7.5, ["x", "y"])
    tensors = safetensors.torch.load(body)
    assert sorted(tensors) == ["clip.0", "clip.1"]
    request = wire.decode_request(bytearray(body))
    assert (request.prompts, request.fps, request.rewards) == (["a", "ü 红"], 7.5, ["x", "y"])
    assert all(torch.equal(tensors[f"clip.{i}"], clip) for i, clip in enumerate(pixels))
    assert all(
        torch.equal(a.pixels, b) and a.at is None
        for a, b in zip(request.clips, pixels, strict=True)
    )


def test_answers_are_checked() -> None:
    good = {"scores": {"r": {"A": [0.5, None]}}, "valid": {"r": [True, False]}}
    assert wire.decode_scores(json.dumps(good).encode(), ["r"], 2)["r"].valid.tolist() == [
        True,
        False,
    ]
    partial = {"scores": {"r": {"A": [0.5, None], "B": [0, 1]}}, "valid": {"r": [True, True]}}
    scores = wire.decode_scores(json.dumps(partial).encode(), ["r"], 2)["r"]
    assert scores.valid.all() and scores.values["A"].isnan().tolist() == [False, True]
    for wrong in (
        {},
        {"scores": {"r": {}}, "valid": {"r": [True, False]}},
        {"scores": {"r": {"A": [0.5]}}, "valid": {"r": [True]}},
        {"scores": {"r": {"A": [0.5, None]}}, "valid": {"r": [True, True]}},
        {"scores": {"r": {"A": [0.5, 0.5]}}, "valid": {"r": [True, False]}},
        {"scores": {"r": {"A": [0.5, None], "B": [0.5, 1.0]}}, "valid": {"r": [True, False]}},
        {"scores": {"r": {"A": [0.5, None], "B": [None, None]}}, "valid": {"r": [True, True]}},
        {"scores": {"r": {"A": [True, None]}}, "valid": {"r": [True, False]}},
        {"scores": {"r": {"A": ["0.5", None]}}, "valid": {"r": [True, False]}},
        {"scores": {"r": {"A": [10**60, None]}}, "valid": {"r": [True, False]}},
        {"scores": {"r": {"A": [math.nan, None]}}, "valid": {"r": [True, False]}},
    ):
        with pytest.raises(wire.WireError):
            wire.decode_scores(json.dumps(wrong).encode(), ["r"], 2)


# ---- life and death


def test_client_survives_a_restart_of_the_server() -> None:
    rewards = {"tiny_world": load(plain("tiny_world"))}
    with (
        running(rewards) as url,
        RewardClient([url], TOKEN, ["tiny_world"], outage_s=30.0) as client,
    ):
        first = client.score(clips(), CAPTIONS, 8.0)
        port = int(url.rsplit(":", 1)[1])
    with (
        RewardClient([url], TOKEN, ["tiny_world"], outage_s=30.0) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        job = threads.submit(client.score, clips(), CAPTIONS, 8.0)
        time.sleep(0.7)
        assert not job.done()
        with running(rewards, port=port):
            assert same(job.result(timeout=20), first)


def test_client_goes_to_the_replica_that_lives(tiny: str, caplog: pytest.LogCaptureFixture) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with RewardClient([dead, tiny], TOKEN, ["tiny_world"], outage_s=20.0) as client:
        for _ in range(12):
            caplog.clear()
            assert client.score(clips()[:1], CAPTIONS[:1], 8.0)["tiny_world"].valid.all()
            assert caplog.text.count("trying again") <= 1  # after one failure it goes elsewhere


def test_unreachable_server_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with RewardClient([url], TOKEN, ["tiny_world"], outage_s=0.5) as client:
        with pytest.raises(
            UserError, match=rf"server.urls={url}: no scores for 0.5 s \(ConnectError.*raise server"
        ):
            client.score(clips(), CAPTIONS, 8.0)
        with pytest.raises(
            UserError, match=rf"server.urls={url}: reward server unreachable for 0.3 s"
        ):
            client.wait_ready(0.3)
    for wrong in ("127.0.0.1:80", "ftp://a", "http://", "http://a:b"):
        with pytest.raises(UserError, match=f"server.urls={wrong}: not a server's address"):
            RewardClient([wrong], TOKEN, ["tiny_world"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_child_leaves_a_log_and_no_secret(beside: tuple[str, str, Path]) -> None:
    url, token, folder = beside
    ready = json.loads((folder / "reward_server.json").read_text())
    assert ready["url"] == url
    assert token.encode() not in Path(f"/proc/{ready['pid']}/cmdline").read_bytes()
    with RewardClient([url], token, ["tiny_world"]) as client:
        client.score(clips(), CAPTIONS, 8.0)
    text = (folder / "reward_server.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"rewards": ["tiny_world"], "url": url}.items() <= next(
        x for x in lines if x["message"] == "serving"
    ).items()
    assert any(x["message"] == "request" and (x["status"], x["clips"]) == (200, 6) for x in lines)
    assert token not in text and CAPTIONS[0] not in text


def test_child_ends_with_the_context_also_when_the_body_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), launch_beside([plain("tiny_world")], tmp_path):
        pid = json.loads((tmp_path / "reward_server.json").read_text())["pid"]
        raise ZeroDivisionError
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "reward_server.json").exists()


def test_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(
            UserError,
            match=r"exited with code 1: rewards\.name='tiny_word': no such reward.*reward_server.log",
        ),
        launch_beside([plain("tiny_word")], tmp_path),
    ):
        pass


PARENT = """
import sys, time
from pathlib import Path
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving.server.child import launch_beside
with launch_beside([plain("tiny_world")], Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(60)
"""


def test_child_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    root = ROOT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "up\n"
        child = json.loads((tmp_path / "reward_server.json").read_text())["pid"]
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Running, not a zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sigterm_drains(tmp_path: Path) -> None:
    """What was accepted is answered; the process ends by itself."""
    with launch_beside([plain("tiny_world")], tmp_path) as (url, token):
        pid = json.loads((tmp_path / "reward_server.json").read_text())["pid"]
        many = clips().repeat(40, 1, 1, 1, 1)
        with (
            RewardClient([url], token, ["tiny_world"], outage_s=0.0) as client,
            ThreadPoolExecutor(1) as threads,
        ):
            job = threads.submit(client.score, many, CAPTIONS * 40, 8.0)
            time.sleep(0.25)
            os.kill(pid, signal.SIGTERM)
            assert job.result()["tiny_world"].valid.all()
    assert not alive(pid)


def test_addresses_that_cannot_be_had_are_one_line() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="choose another, or port 0"),
    ):
        serve(
            [plain("tiny_world")],
            host="127.0.0.1",
            port=taken.getsockname()[1],
            token=TOKEN,
            ready_file=None,
        )
    with pytest.raises(
        UserError, match=r"host=0.0.0.0: reachable from other machines; give a token of at least 16"
    ):
        serve([plain("tiny_world")], host="0.0.0.0", port=0, token="short", ready_file=None)
    with pytest.raises(UserError, match="token=''"):
        serve([plain("tiny_world")], host="127.0.0.1", port=0, token="", ready_file=None)


def test_a_token_that_no_header_carries_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_bytes("gre\u00fc\u00df".encode())
    command = cli.parser().parse_args(["serve-rewards", "tiny_world", "--token-file", str(token)])
    options.with_paths(command)
    with pytest.raises(UserError, match=f"--token-file={token}: no usable token in it"):
        serve_rewards(command)
    monkeypatch.setenv("FASTGRPO_TOKEN", "two\nlines")
    with pytest.raises(UserError, match="FASTGRPO_TOKEN: no usable token"):
        serve_rewards(cli.parser().parse_args(["serve-rewards", "tiny_world"]))


def test_a_missing_file_is_not_looked_for_on_the_hub() -> None:
    for name in ("weights/HPS_v2.1_compressed.pt", "weights/absent.safetensors"):
        with pytest.raises(
            UserError, match=f"rewards.path={name}: no such file or folder; fetch it."
        ):
            weight_files.locate(
                name, names=["a.pt"], beside=[], where="rewards.path", remedy="fetch it"
            )
