"""Every state of a connection ends, and connections without the token shut nobody out."""

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import httpx
import pytest
import torch
from torch import Tensor

from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.server.guests import Guests
from tests.harness.servers import CAPTIONS, TOKEN, clips, post, running

pytestmark = pytest.mark.slow  # a thousand connections

PROBE = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
SECRET = f"Authorization: Bearer {TOKEN}\r\n".encode()


class Ones(Reward):
    names = ("A",)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        return Scores({"A": torch.ones(len(prompts))}, torch.ones(len(prompts), dtype=torch.bool))


class Particular(Ones):
    """Cannot say which frames it looks at, as where a rate overflows its arithmetic."""

    def frames_used(self, frames: int, fps: float) -> list[int] | None:
        raise OverflowError(f"{frames / fps}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running({"ones": Ones(), "particular": Particular()}) as url:
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10.0)


def probed(connection: socket.socket, head: bytes) -> None:
    """Send a request's head and read its answer."""
    connection.sendall(head)
    said = b""
    while b'"alive"' not in said:
        said += connection.recv(4096)


def ended(connection: socket.socket) -> bool:
    """Whether the peer ends the connection within its timeout."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def byte_of_a_body(connection: socket.socket) -> None:
    probed(connection, PROBE + b"Content-Length: 1000000\r\n\r\n")
    connection.sendall(b"x")


def empty_line(connection: socket.socket) -> None:
    probed(connection, PROBE + b"\r\n")
    connection.sendall(b"\r\n")


def nothing_more(connection: socket.socket) -> None:
    probed(connection, PROBE + b"\r\n")


def body_of_a_friend(connection: socket.socket) -> None:
    probed(connection, PROBE + SECRET + b"Content-Length: 1000000\r\n\r\n")
    connection.sendall(b"x")


def silence(connection: socket.socket) -> None:
    pass


STATES = (silence, byte_of_a_body, empty_line, nothing_more, body_of_a_friend)


@pytest.mark.parametrize("state", STATES)
def test_every_state_ends_however_little_is_sent(
    server: str, state: Callable[[socket.socket], None]
) -> None:
    with closing(connect(server)) as connection:
        connection.settimeout(4.0)  # the server's limits are 1 s here
        state(connection)
        assert ended(connection)


def test_bytes_do_not_prolong_a_state(server: str) -> None:
    with closing(connect(server)) as connection:
        probed(connection, PROBE + b"Content-Length: 1000000\r\n\r\n")
        start = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() - start < 5.0:
                connection.sendall(b"x")
                time.sleep(0.1)


def test_an_idle_connection_with_the_token_stays(server: str) -> None:
    with closing(connect(server)) as connection:
        probed(connection, PROBE + SECRET + b"\r\n")
        time.sleep(2.0)
        probed(connection, PROBE + b"\r\n")


def test_idle_strangers_shut_nobody_out() -> None:
    """1,030 connections that come again as they are ended, and a client that scores meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    over = threading.Event()

    def flood(url: str, stack: ExitStack) -> None:
        for number in range(1030):
            if over.is_set():
                return
            connection = stack.enter_context(closing(connect(url)))
            if number % 3:
                connection.sendall(PROBE + b"Content-Length: 1000000\r\n\r\nx")

    try:
        with running({"ones": Ones()}) as url, ExitStack() as stack:
            thread = threading.Thread(target=flood, args=(url, stack))
            thread.start()
            with RewardClient([url], TOKEN, ["ones"], outage_s=5.0) as client:
                while thread.is_alive():
                    assert client.score(clips(), CAPTIONS, 8.0)["ones"].valid.all()
                assert client.score(clips(), CAPTIONS, 8.0)["ones"].valid.all()
            assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
            over.set()
            thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_oldest_guest_of_the_fullest_address_makes_room() -> None:
    shown_out: list[int] = []
    guests = Guests(most=4, most_per_address=3)

    def enter(guest: int, address: str) -> None:
        guests.enter(guest, address, lambda: shown_out.append(guest))

    for guest in range(4):
        enter(guest, "flood")
    assert shown_out == [0] and len(guests) == 3
    enter(4, "other")
    enter(5, "third")  # all are there: not the oldest of all, which may be alone
    assert shown_out == [0, 1] and len(guests) == 4
    guests.leave(2)
    guests.leave(2)  # as when it has shown the token and is closed later
    enter(6, "third")
    assert shown_out == [0, 1] and len(guests) == 4


def test_a_rate_beyond_a_rewards_arithmetic_is_refused(server: str) -> None:
    body = wire.encode_request(list(clips()[:1]), CAPTIONS[:1], 1e-308, ["particular"])
    answer = post(server, body)
    assert answer.status_code == 400 and "particular does not say" in answer.text
    spec = httpx.get(
        f"{server}/v1/spec?frames=9&fps=8",
        headers={"Authorization": f"Bearer {TOKEN}"},
        trust_env=False,
    )
    assert spec.status_code == 400
