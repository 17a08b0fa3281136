"""Reward servers in threads of the test's process, and the clips that go to them."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch
import uvicorn

from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards import plain
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.rewards.serving.server.admission import Limits
from fastgrpo.rewards.serving.server.app import make_app
from fastgrpo.rewards.serving.server.process import serving
from fastgrpo.tools.check.reward_contract import CAPTIONS, clips

__all__ = ["CAPTIONS", "TOKEN", "clips", "post", "running", "same"]

TOKEN = "a token of the tests"


def same(a: dict[str, Scores], b: dict[str, Scores]) -> bool:
    """Equal bit for bit, NaN included."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].valid, b[name].valid)
        and a[name].values.keys() == b[name].values.keys()
        and all(
            torch.equal(v.view(torch.int32), b[name].values[p].view(torch.int32))
            for p, v in a[name].values.items()
        )
        for name in a
    )


@contextmanager
def running(
    rewards: dict[str, Reward],
    port: int = 0,
    max_waiting: int = 2**30,
    max_body: int = 2**20,
    batch_size: int = 8,
    wait_s: float = 0.01,
    room_wait_s: float = 0.0,
    max_working: int = 2**32,
) -> Iterator[str]:
    """A server in a thread of this process, for rewards that no file holds."""
    limits = Limits(
        max_body=max_body,
        max_waiting=max_waiting,
        room_wait_s=room_wait_s,
        max_working=max_working,
        body_timeout_s=1.0,
        head_timeout_s=1.0,
        batch_wait_s=wait_s,
    )
    spec = plain("any").model_copy(update={"batch_size": batch_size})
    served = [
        Served(reward, spec.model_copy(update={"name": name})) for name, reward in rewards.items()
    ]
    app = make_app(served, TOKEN, limits)
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(serving(app, limits))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def post(url: str, body: bytes, token: str = TOKEN, **headers: str) -> httpx.Response:
    sent = {"Authorization": f"Bearer {token}", "Content-Type": wire.CONTENT_TYPE} | headers
    return httpx.post(f"{url}/v1/score", content=body, headers=sent, trust_env=False)
