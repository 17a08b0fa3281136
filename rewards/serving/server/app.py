"""The reward server: POST clips, get scores. One process per device, one batch scored at a time.

  POST /v1/score   a request of `wire`; bearer token
  GET  /v1/spec    the rewards, their parts and identities, the caps, the golden clip's scores;
                   bearer token. With ?frames=F&fps=S also the frames that each reward looks at in
                   such a clip: send no others
  GET  /metrics    counters for Prometheus; bearer token
  GET  /livez      the process answers
  GET  /readyz     it takes requests: weights loaded and hashed, golden clip scored, not draining

A request is refused by its headers before its body is read: wrong token 401, no Content-Length 411,
too long 413. Where too many bytes wait, the request waits unread, too, and then gets 429. SIGTERM
drains: no new request is taken, and those that were taken are answered.
"""

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import replace_text
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.loaded_reward import Served, load_served
from fastgrpo.rewards.serving.server import logs
from fastgrpo.rewards.serving.server.admission import (
    Admission,
    Limits,
    Refusal,
    authenticate,
    body_length,
    patience,
    read_body,
)
from fastgrpo.rewards.serving.server.batcher import Batcher, Expired, Failed
from fastgrpo.rewards.serving.server.metrics import Meters
from fastgrpo.rewards.serving.server.strict_http import KEEP_ALIVE_S, strict_http

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class ServerState:
    """State that every request needs."""

    served: dict[str, Served]
    token: str
    limits: Limits
    admission: Admission
    batcher: Batcher
    meters: Meters
    # takes bodies apart, so that a long header does not stop the event loop
    reading: ThreadPoolExecutor
    ready: bool = False
    worker: asyncio.Task[None] | None = None  # scores what waits

    @classmethod
    def open(cls, served: Sequence[Served], token: str, limits: Limits) -> "ServerState":
        """The state of a server that takes no requests yet."""
        by_name = {one.name: one for one in served}
        admission = Admission(limits.max_waiting, limits.room_wait_s)
        batcher = Batcher(by_name, limits.batch_wait_s)
        batcher.meters = meters = Meters(lambda: admission.bytes, batcher.clips_waiting)
        reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
        return cls(
            served=by_name,
            token=token,
            limits=limits,
            admission=admission,
            batcher=batcher,
            meters=meters,
            reading=reading,
        )

    @property
    def lives(self) -> bool:
        """Whether anything that waits will be scored."""
        return self.worker is not None and not self.worker.done()

    async def score(self, request: Request) -> tuple[bytes, int]:
        """Answer to a request, and the number of its clips.

        Raises Refusal, or WireError for a body that is not well-formed.
        """
        authenticate(request, self.token)
        if not self.lives:
            raise Refusal(503, "scoring has ended; see the server's log")
        length, seconds = body_length(request, self.limits.max_body), patience(request)
        start = time.monotonic()
        async with self.admission.room(length, seconds / 2):
            # a small body is sent before it is read: its sender waits already
            seconds -= time.monotonic() - start
            body = await read_body(request, length, self.limits.body_timeout_s)
            deadline = time.monotonic() + seconds
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self.reading, wire.decode_request, body)
            del body  # the clips hold what they need of it
            unknown = [name for name in asked.rewards if name not in self.served]
            if unknown:
                here = ", ".join(self.served)
                raise Refusal(
                    422, f"no reward '{unknown[0]}' here; this server has {here}", close=False
                )
            try:
                by_name = await self.batcher.score(
                    asked.rewards, asked.clips, asked.prompts, fps=asked.fps, deadline=deadline
                )
            except Expired:
                raise Refusal(504, f"not scored within {seconds:.3g} s", close=False) from None
            except Failed:
                raise Refusal(500, "not scored; see the server's log", close=False) from None
        identities = {name: self.served[name].identity for name in by_name}
        return wire.encode_scores(by_name, identities), len(asked.clips)

    def spec(self, frames: int | None, fps: float | None) -> dict[str, object]:
        """The answer of /v1/spec."""
        rewards: dict[str, dict[str, object]] = {}
        for name, one in self.served.items():
            rewards[name] = {
                "parts": list(one.reward.names),
                "identity": one.identity,
                "fingerprint": one.fingerprint,
                "dtype": one.spec.dtype,
                "batch_size": one.spec.batch_size,
                "golden": one.golden,
                "golden_clip": "own" if one.reward.golden is not None else "drawn",
            }
            if frames is not None and fps is not None:
                rewards[name]["looks_at"] = one.frames_used(frames, fps)
        caps = {"max_body": self.limits.max_body, "max_clips": wire.MAX_CLIPS}
        return {
            "rewards": rewards,
            **caps,
            "max_frames": wire.MAX_FRAMES,
            "max_pixels": wire.MAX_PIXELS,
        }


def make_app(served: Sequence[Served], token: str, limits: Limits | None = None) -> FastAPI:
    """The application for rewards that are loaded and warm."""
    if not token:
        raise UserError("token='': the reward server needs one; give a long random text")
    limits = limits or Limits()
    state = ServerState.open(served, token, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.worker = asyncio.create_task(state.batcher.run())
        state.ready = True
        yield
        state.ready = False
        state.worker.cancel()
        await asyncio.wait([state.worker])
        state.batcher.thread.shutdown()
        state.reading.shutdown()

    app = FastAPI(title="fastgrpo reward server", lifespan=lifespan, openapi_url=None)
    app.state.server = state
    add_probes(app, state)
    add_scores(app, state)
    return app


def add_probes(app: FastAPI, state: ServerState) -> None:
    """Add the routes that say how the server is; each answers at once."""

    @app.get("/livez")
    async def livez() -> str:
        return "alive"

    @app.get("/readyz")
    async def readyz() -> str:
        if not state.ready:
            raise HTTPException(503, "starting or draining")
        if not state.lives:
            raise HTTPException(503, "scoring has ended; see the server's log")
        return "ready"

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authenticate(request, state.token)
        return Response(state.meters.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/spec")
    async def spec(request: Request) -> dict[str, object]:
        authenticate(request, state.token)
        try:
            return state.spec(*clip_form(request))
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from None


def add_scores(app: FastAPI, state: ServerState) -> None:
    """Add the route that clips are sent to."""

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        start, status, clips = time.perf_counter(), 500, 0
        try:
            answer, clips = await state.score(request)
            status = 200
        except wire.WireError as error:
            status = 400
            raise Refusal(400, str(error), close=False) from None
        except HTTPException as refusal:
            status = refusal.status_code
            raise
        finally:
            seconds = time.perf_counter() - start
            state.meters.request(status, seconds)
            log.info(
                "request", extra=logs.fields(status=status, clips=clips, seconds=round(seconds, 4))
            )
        return Response(answer, media_type="application/json")


def clip_form(request: Request) -> tuple[int | None, float | None]:
    """Frames and frames per second of /v1/spec's query. None: the query has none."""
    frames, fps = request.query_params.get("frames"), request.query_params.get("fps")
    if frames is None and fps is None:
        return None, None
    try:
        count, rate = int(frames or ""), float(fps or "")
    except ValueError:
        raise HTTPException(400, "frames and fps must be numbers") from None
    if not (1 <= count <= wire.MAX_FRAMES and 0 < rate < 1e6):
        raise HTTPException(400, f"frames must be 1 to {wire.MAX_FRAMES}, fps above 0")
    return count, rate


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
        timeout_graceful_shutdown=60,
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

    ready_file: written, as a whole, with {"url": ..., "pid": ...} once requests are taken.
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
    logs.start()
    allow_many_connections()
    limits = limits or Limits()
    listener = bound(host, port)
    named = socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{named}]' if ':' in named else named}:{listener.getsockname()[1]}"
    with listener:
        app = make_app([warm(spec) for spec in specs], token, limits)
        log.info("serving", extra=logs.fields(rewards=[spec.name for spec in specs], url=url))
        _Server(serving(app, limits), app.state.server, url, ready_file).run(sockets=[listener])


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
