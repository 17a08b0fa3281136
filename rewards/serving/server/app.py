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
drains: no new request is taken, and those that were taken are answered; what takes longer than a
minute gets 503 with Retry-After, so that its sender asks another server. So does a request whose
reward asks elsewhere, such as vlm_judge, while nothing answers there.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, HTTPException, Request, Response

from fastgrpo.core.errors import Unavailable, UserError
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.rewards.serving.server import logs
from fastgrpo.rewards.serving.server.admission import (
    Admission,
    Limits,
    Refusal,
    authenticate,
    body_length,
    draining,
    patience,
    read_body,
)
from fastgrpo.rewards.serving.server.batcher import (
    Batcher,
    Expired,
    Failed,
    Refused,
    TooLarge,
)
from fastgrpo.rewards.serving.server.metrics import Meters

log = logging.getLogger(__name__)


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
        batcher = Batcher(by_name, limits.batch_wait_s, limits.max_working)
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
        if not self.ready:
            raise draining()
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
            except TooLarge as error:
                raise Refusal(413, str(error), close=False) from None
            except Expired:
                raise Refusal(504, f"not scored within {seconds:.3g} s", close=False) from None
            except Unavailable:
                raise Refusal(
                    503, "what it asks does not answer", close=False, headers={"Retry-After": "1"}
                ) from None
            except Refused as mistake:
                raise Refusal(422, str(mistake), close=False) from None
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
        # a batch under way may take minutes, and nobody waits for it any more
        state.batcher.thread.shutdown(wait=False, cancel_futures=True)
        state.reading.shutdown(wait=False, cancel_futures=True)

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
        except asyncio.CancelledError:  # by uvicorn, at the end of its patience with this server
            status = 503
            raise draining() from None
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
