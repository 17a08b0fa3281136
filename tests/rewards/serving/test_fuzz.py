"""10,000 malformed requests to a server of its own process: nothing but 4xx, bounded memory, and it
still scores.
"""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx
import pytest

from fastgrpo.core.config import RewardSpec
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.in_process import ScorerInProcess
from tests import ROOT
from tests.harness import endpoint
from tests.harness.damaged_requests import damaged, fitting
from tests.harness.servers import CAPTIONS, TOKEN, clips, same

COUNT = 10_000
MIB = 2**20
MAX_BODY, MAX_WAITING = 16 * MIB, 48 * MIB
SERVER = f"""
import sys
from pathlib import Path
from fastgrpo.core.config import RewardSpec
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving.server.admission import Limits
from fastgrpo.rewards.serving.server.process import serve
limits = Limits(max_body={MAX_BODY}, max_waiting={MAX_WAITING}, body_timeout_s=3.0, head_timeout_s=1.0)
judge = RewardSpec.model_validate_json(sys.argv[2])
serve([plain("tiny_world"), judge], "127.0.0.1", 0, sys.stdin.read(), Path(sys.argv[1]), limits)
"""

NAMES = ("tiny_world", "vlm_judge")
JUDGE = RewardSpec(
    name="vlm_judge",
    weights={},
    options={
        "endpoints": endpoint.shared(),
        "model": endpoint.MODEL,
        "question": "Is it {prompt}?",
    },
)


@dataclass
class Child:
    host: str
    port: int
    pid: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def memory(self, key: str = "VmRSS") -> int:
        """MiB; VmHWM is the peak."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) // 1024

    def connect(self, timeout_s: float = 30.0) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout_s)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("server")
    ready, log = folder / "ready", folder / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(ready), JUDGE.model_dump_json()],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        assert child.stdin is not None
        child.stdin.write(TOKEN.encode())
        child.stdin.close()
        deadline = time.monotonic() + 60.0
        while not ready.exists():
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        said = json.loads(ready.read_text())
        yield Child("127.0.0.1", int(said["url"].rsplit(":", 1)[1]), said["pid"], log)
    finally:
        child.kill()
        child.wait()


def head(length: int | str, token: str = TOKEN, kind: str = wire.CONTENT_TYPE) -> bytes:
    return (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: "
        f"{kind}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def read_status(stream: BinaryIO) -> int:
    """The status of the next answer on a connection, whose body is read away."""
    line = stream.readline()
    assert line.startswith(b"HTTP/1.1 "), line
    length = 0
    while (header := stream.readline().strip()) != b"":
        name, _, value = header.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    stream.read(length)
    return int(line.split()[1])


def send_many(server: Child, bodies: list[bytes], at_once: int = 20) -> list[int]:
    """Statuses of the bodies, several at a time down one connection."""
    statuses: list[int] = []
    with server.connect() as connection, connection.makefile("rb") as stream:
        for start in range(0, len(bodies), at_once):
            some = bodies[start : start + at_once]
            connection.sendall(b"".join(head(len(body)) + body for body in some))
            statuses += [read_status(stream) for _ in some]
    return statuses


def answer_to(server: Child, data: bytes) -> bytes:
    """What the server says to these bytes on a connection of their own, until it ends it."""
    with server.connect(5.0) as connection:
        said = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(65536):
                said += chunk
                if b"\r\n\r\n" in said:
                    break
        except (ConnectionResetError, BrokenPipeError):
            pass
        return said


def raw_requests() -> dict[str, tuple[bytes, bytes]]:
    """Requests that are wrong before their body, and how the answer must begin."""
    good = wire.encode_request(list(clips()[:1]), CAPTIONS[:1], 8.0, ["tiny_world"])
    token = f"Authorization: Bearer {TOKEN}\r\nContent-Type: {wire.CONTENT_TYPE}\r\n".encode()
    post = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"
    return {
        "no token": (post + b"Content-Length: 5\r\n\r\n", b"HTTP/1.1 401"),
        "wrong token": (head(99_999, "x"), b"HTTP/1.1 401"),
        "almost the token": (head(99_999, TOKEN[:-1]), b"HTTP/1.1 401"),
        "token twice": (head(99_999, TOKEN + TOKEN), b"HTTP/1.1 401"),
        "body too long": (head(MAX_BODY + 1), b"HTTP/1.1 413"),
        "body beyond numbers": (head("9" * 17), b"HTTP/1.1 413"),
        "length overflows": (head("9" * 40), b"HTTP/1.1 400"),
        "length no number": (head("ten"), b"HTTP/1.1 400"),
        "negative length": (head("-1"), b"HTTP/1.1 400"),
        "no length": (post + token + b"\r\n", b"HTTP/1.1 411"),
        "chunked": (
            post + token + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
            b"HTTP/1.1 411",
        ),
        "both": (
            post + token + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 400",
        ),
        "other type": (head(len(good), kind="application/json") + good, b"HTTP/1.1 415"),
        "pickle type": (head(len(good), kind="application/x-pickle") + good, b"HTTP/1.1 415"),
        "longer than it says": (head(len(good) - 7) + good, b"HTTP/1.1 400"),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, b"HTTP/1.1 400"),
        "many headers": (
            post + b"X: " + b"a" * 100 + b"\r\n" + b"Y: b\r\n" * 20_000,
            b"HTTP/1.1 431",
        ),
        "one long header": (post + b"X: " + b"a" * 300_000, b"HTTP/1.1 431"),
        "other method": (b"PUT /v1/score HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 405"),
        "a file": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 404"),
    }


def test_ten_thousand_malformed_requests(server: Child) -> None:
    rng = random.Random(0)
    bodies = [damaged(rng, NAMES) for _ in range(COUNT)]
    fits = [fitting(body, NAMES) for body in bodies]
    assert fits.count(400) > 0.97 * COUNT
    expected = ScorerInProcess([plain("tiny_world"), JUDGE]).score(clips(), CAPTIONS, 8.0)
    with RewardClient([server.url], TOKEN, NAMES) as client:
        assert same(client.score(clips(), CAPTIONS, 8.0), expected)
    before = server.memory()

    start = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        halves = list(
            threads.map(
                lambda part: send_many(server, part), (bodies[: COUNT // 2], bodies[COUNT // 2 :])
            )
        )
    statuses = halves[0] + halves[1]
    print(f"\n{COUNT} bodies in {time.monotonic() - start:.1f} s: {dict(Counter(statuses))}")
    for body, fit, status in zip(bodies, fits, statuses, strict=True):
        assert status == fit, (status, body[:300])

    for what, (data, begins) in raw_requests().items():
        assert answer_to(server, data).startswith(begins), what

    print(
        f"resident: {before} MiB before, {server.memory()} MiB after, peak "
        f"{server.memory('VmHWM')} MiB"
    )
    assert server.memory("VmHWM") < before + 100
    with RewardClient([server.url], TOKEN, NAMES) as client:
        assert same(client.score(clips(), CAPTIONS, 8.0), expected)
    text = server.log.read_text()
    assert TOKEN not in text and "a red circle" not in text and '"status": 500' not in text


RESET = b"reset"
"""In place of the last words: where the machine is too busy for the server to have read all before
its timer ends, the system tells of the end by a reset."""


def last_words(connection: socket.socket) -> bytes:
    """What the server said before it ended the connection."""
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return RESET


def test_slow_and_silent_senders_do_not_stay_and_others_are_served(server: Child) -> None:
    good = wire.encode_request(list(clips()[:1]), CAPTIONS[:1], 8.0, ["tiny_world"])
    lines = {
        "silent": b"",
        "half a line": b"POST /v1/sco",
        "headers without end": b"POST /v1/score HTTP/1.1\r\nHost: x\r\n",
        "no body": head(len(good)),
        "some of the body": head(len(good)) + good[:1000],
    }
    connections = {what: [server.connect() for _ in range(20)] for what in lines}
    trickling = server.connect()
    try:
        for what, some in connections.items():
            for connection in some:
                connection.sendall(lines[what])
        assert httpx.get(f"{server.url}/livez", trust_env=False).status_code == 200
        with RewardClient([server.url], TOKEN, ["tiny_world"]) as client:
            assert client.score(clips(), CAPTIONS, 8.0)["tiny_world"].valid.all()
        start = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() - start < 10.0:
                trickling.sendall(b"POST /" if time.monotonic() - start < 0.1 else b"x")
                time.sleep(0.1)
        for what, some in connections.items():
            for connection in some:
                said = last_words(connection)
                ended = said == RESET or (
                    said.startswith(b"HTTP/1.1 408") if "body" in what else said == b""
                )
                assert ended, (what, said)
    finally:
        for connection in (trickling, *(c for some in connections.values() for c in some)):
            connection.close()


def test_memory_is_bounded_by_admission_whatever_is_sent(server: Child) -> None:
    """64 senders of 16 MiB of rubbish each, 1 GiB in all, into a server that admits 48 MiB at a
    time.
    """
    before = server.memory()
    rubbish = struct.pack("<Q", 2**62) + bytes(MAX_BODY - 8)

    def send(_: int) -> int:
        with server.connect() as connection, connection.makefile("rb") as stream:
            try:
                connection.sendall(head(len(rubbish)))
                connection.sendall(rubbish)
                return read_status(stream)
            except (ConnectionResetError, BrokenPipeError):
                # where this machine is too busy for the server's 3 s; the answer is lost in the
                # reset
                return 408

    with ThreadPoolExecutor(16) as threads:
        statuses = Counter(threads.map(send, range(64)))
    peak = server.memory("VmHWM")
    print(f"\n{dict(statuses)}; resident: {before} MiB before, peak {peak} MiB")
    assert set(statuses) <= {400, 408, 429} and statuses[400] > 0
    assert peak < before + 48 + 100
    with RewardClient([server.url], TOKEN, ["tiny_world"]) as client:
        assert client.score(clips(), CAPTIONS, 8.0)["tiny_world"].valid.all()


def test_without_the_token_nothing_of_a_body_is_read(server: Child) -> None:
    """The sender of 64 MiB without a token gets its answer, and far less than that was taken from
    it.
    """
    for token in (None, "wrong"):
        line = b"" if token is None else f"Authorization: Bearer {token}\r\n".encode()
        request = (
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\n" + line + b"Content-Length: 67108864\r\n\r\n"
        )
        with server.connect() as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith(b"HTTP/1.1 401")
            connection.setblocking(True)
            taken = 0
            try:
                while taken < 64 * MIB:
                    taken += connection.send(bytes(65536))
            except (ConnectionResetError, BrokenPipeError):
                pass
            assert taken < 8 * MIB  # what the two sockets hold
