"""The process of a reward server: its address, its ready file, and its end by a signal."""

import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.rewards.serving.loaded_reward import Served, load_served
from fastgrpo.rewards.serving.server import logs
from fastgrpo.rewards.serving.server.admission import Limits
from fastgrpo.rewards.serving.server.app import ServerState, make_app
from fastgrpo.rewards.serving.server.strict_http import KEEP_ALIVE_S, strict_http

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Server(uvicorn.Server):
    """uvicorn's server, which writes the ready file once requests are taken.

    From the signal that ends it on it is not ready.
    """

    def __init__(
        self, config: uvicorn.Config, state: ServerState, url: str, ready_file: Path | None
    ) -> None:
        super().__init__(config)
        self.state = state
        self.url = url
        self.ready_file = ready_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready_file is not None:
            replace_text(self.ready_file, json.dumps({"url": self.url, "pid": os.getpid()}) + "\n")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        forget(self.ready_file, os.getpid())  # from now on it takes no requests
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.state.ready = False
        log.info("draining", extra=logs.fields(signal=signal.Signals(sig).name))
        super().handle_exit(sig, frame)


def serving(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """Configuration with which uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=strict_http(limits, app.state.server.token),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=limits.drain_s,
    )


def serve(
    specs: Sequence[RewardSpec],
    host: str,
    port: int,
    token: str,
    ready_file: Path | None,
    limits: Limits | None = None,
) -> None:
    """Serve the rewards until SIGTERM or SIGINT; port 0 takes a free one.

    ready_file: written, as a whole, with {"url": ..., "pid": ...} once requests are taken; removed
    before and at the end.
    Raises UserError for an unknown reward, one that cannot be loaded or fails at its golden clip,
    an address that cannot be had, or one beyond this machine with a weak token.
    """
    if host not in LOOPBACK and len(token) < 16:
        raise UserError(
            f"host={host}: reachable from other machines; give a token of at least 16 random "
            "characters"
        )
    if not token:
        raise UserError("token='': the reward server needs one; give a long random text")
    forget(ready_file)
    logs.start()
    if host not in LOOPBACK:
        log.warning(
            "reachable from other machines without TLS: clips, prompts and the token travel in "
            "the clear; keep to a network that is your own, or put a proxy with TLS before it",
            extra=logs.fields(host=host),
        )
    allow_many_connections()
    limits = limits or Limits()
    listener = bound(host, port)
    named = socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{named}]' if ':' in named else named}:{listener.getsockname()[1]}"
    with listener:
        app = make_app([warm(spec) for spec in specs], token, limits)
        log.info("serving", extra=logs.fields(rewards=[spec.name for spec in specs], url=url))
        _Server(serving(app, limits), app.state.server, url, ready_file).run(sockets=[listener])


def forget(ready_file: Path | None, pid: int | None = None) -> None:
    """Remove a ready file: somebody may wait for it.

    pid: only where it is this process's. None: whosever it is, such as of a server that was killed
    """
    if ready_file is None:
        return
    with suppress(OSError, ValueError):
        if pid is None or json.loads(ready_file.read_text(encoding="utf-8")).get("pid") == pid:
            ready_file.unlink()


def allow_many_connections() -> None:
    """Let this process hold as many connections as the system allows it; often 1024 before.

    A few hundred ranks send several requests each at a time.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bound(host: str, port: int) -> socket.socket:
    """A socket with the address that does not listen yet.

    Until the rewards are loaded, clients are refused at once.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"host={host} port={port}: {error}; choose another, or port 0 for a free one"
        ) from None
    return listener


@torch.no_grad()
def warm(spec: RewardSpec) -> Served:
    """Load a reward and score the golden clip."""
    start = time.perf_counter()
    served = load_served(spec)
    served.warm_up()
    log.info(
        "loaded",
        extra=logs.fields(
            reward=served.name,
            identity=served.identity,
            golden=served.golden,
            seconds=round(time.perf_counter() - start, 2),
        ),
    )
    return served
