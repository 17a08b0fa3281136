"""The reward server: POST clips, get scores. One process per device, one request scored at a time.

  POST /v1/score   a request of `wire`; bearer token
  GET  /v1/spec    the rewards, their parts, and the caps; bearer token
  GET  /livez      the process answers
  GET  /readyz     it takes requests: not while it starts or drains

A request is refused by its headers before its body is read: wrong token 401, no Content-Length 411, too long 413,
too much waiting 429. SIGTERM drains: no new request is taken, those that were are answered.
`launch_beside` runs a server as a child of the trainer.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

import fastgrpo
from fastgrpo.errors import UserError
from fastgrpo.lifetime import die_with
from fastgrpo.rewards import Reward, judge, load, wire

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "FASTGRPO_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def make_app(
    rewards: dict[str, Reward],
    token: str,
    max_body: int = wire.MAX_BODY,
    max_waiting: int = 4 * wire.MAX_BODY,
    body_timeout_s: float = 60.0,
) -> FastAPI:
    """The application. max_body, max_waiting: bytes of one request, and of all that are read or wait to be scored."""
    if not token:
        raise UserError("token='': the reward server needs one; give a long random text")
    scoring = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")  # rewards need not be thread-safe
    waiting = 0
    ready = False

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal ready
        ready = True
        yield
        ready = False
        scoring.shutdown()

    app = FastAPI(title="fastgrpo reward server", lifespan=lifespan, openapi_url=None)

    @app.get("/livez")
    async def livez() -> str:
        return "alive"

    @app.get("/readyz")
    async def readyz() -> str:
        if not ready:
            raise HTTPException(503, "starting or draining")
        return "ready"

    @app.get("/v1/spec")
    async def spec(request: Request) -> dict[str, object]:
        authenticate(request, token)
        parts = {name: list(reward.names) for name, reward in rewards.items()}
        return {"rewards": parts, "max_body": max_body, "max_clips": wire.MAX_CLIPS}

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        nonlocal waiting
        authenticate(request, token)
        length = body_length(request, max_body)
        if waiting and waiting + length > max_waiting:
            raise HTTPException(429, "too many clips are waiting", headers={"Retry-After": "1"})
        waiting += length
        try:
            body = await read_body(request, length, body_timeout_s)
            answer = await asyncio.get_running_loop().run_in_executor(scoring, score_body, rewards, body)
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            waiting -= length
        return Response(answer, media_type="application/json")

    return app


def authenticate(request: Request, token: str) -> None:
    """Refuse with 401 unless the request carries the token; takes the same time however much of it is right."""
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "wrong token", headers={"WWW-Authenticate": "Bearer"})


def body_length(request: Request, most: int) -> int:
    """The declared length of the body, which must be declared and at most `most`."""
    if request.headers.get("content-type") != wire.CONTENT_TYPE:
        raise HTTPException(415, f"expected Content-Type: {wire.CONTENT_TYPE}")
    declared = request.headers.get("content-length")
    if declared is None or not declared.isascii() or not declared.isdigit():
        raise HTTPException(411, "Content-Length is required")
    if len(declared) > 18 or int(declared) > most:
        raise HTTPException(
            413, f"body of {declared[:18]} bytes, above {most}; send fewer or smaller clips per request"
        )
    return int(declared)


async def read_body(request: Request, length: int, timeout_s: float) -> bytearray:
    """The body, within the time limit.  Raises WireError where it is not as long as declared."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > length:
                    break
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {timeout_s:g} s") from None
    except ClientDisconnect:
        raise wire.WireError("body: the client went away") from None
    if len(body) != length:
        raise wire.WireError(f"body: {len(body)} bytes where Content-Length says {length}")
    return body


def score_body(rewards: dict[str, Reward], body: bytearray) -> bytes:
    """The answer to a request; runs in the scoring thread."""
    request = wire.decode_request(body)
    unknown = [name for name in request.rewards if name not in rewards]
    if unknown:
        raise HTTPException(422, f"no reward '{unknown[0]}' here; this server has {', '.join(rewards)}")
    start = time.perf_counter()
    scores = {name: judge(rewards[name], request.clips, request.prompts, request.fps) for name in request.rewards}
    invalid = {name: int((~result.valid).sum()) for name, result in scores.items() if not result.valid.all()}
    log.info(
        "%d clips in %.1f ms%s",
        len(request.clips), 1e3 * (time.perf_counter() - start), f", invalid: {invalid}" if invalid else "",
    )  # fmt: skip
    return wire.encode_scores(scores)


class _Server(uvicorn.Server):
    """Writes the ready file once requests are taken."""

    def __init__(self, config: uvicorn.Config, url: str, ready_file: Path | None) -> None:
        super().__init__(config)
        self.url = url
        self.ready_file = ready_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready_file is not None:
            partial = self.ready_file.with_name(self.ready_file.name + ".partial")
            partial.write_text(json.dumps({"url": self.url, "pid": os.getpid()}) + "\n", encoding="utf-8")
            partial.replace(self.ready_file)


def serve(names: Sequence[str], host: str, port: int, token: str, ready_file: Path | None) -> None:
    """Serve the rewards until SIGTERM or SIGINT; port 0 takes a free one.

    ready_file: written, as a whole, with {"url": ..., "pid": ...} once requests are taken.
    Raises UserError for an unknown reward, an address that cannot be had, or one beyond this machine with a weak token.
    """
    if host not in LOOPBACK and len(token) < 16:
        raise UserError(f"host={host}: reachable from other machines; give a token of at least 16 random characters")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = make_app({name: load(name) for name in names}, token)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"host={host} port={port}: {error}; choose another, or port 0 for a free one") from None
    named = socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{named}]' if ':' in named else named}:{listener.getsockname()[1]}"
    log.info("rewards %s at %s", ", ".join(names), url)
    config = uvicorn.Config(app, log_config=None, access_log=False, limit_concurrency=256, timeout_graceful_shutdown=60)
    with listener:
        _Server(config, url, ready_file).run(sockets=[listener])


@contextmanager
def launch_beside(names: Sequence[str], folder: Path, start_timeout_s: float = 120.0) -> Iterator[tuple[str, str]]:
    """Run a server of these rewards as a child process for as long as the context lasts; gives its (url, token).

    It listens on this machine only, logs to folder/reward_server.log, and dies with the calling process, however that
    ends. Call from the main thread: Linux takes the end of the calling thread for the end of the parent.
    Raises UserError, with the log's last line, where the server does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log_file = folder / "reward_server.json", folder / "reward_server.log"
    ready_file.unlink(missing_ok=True)
    token = secrets.token_urlsafe(32)
    root = str(Path(fastgrpo.__file__).parents[1])  # the child finds the package also where it is not installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    child_environment = {TOKEN_VARIABLE: token, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with log_file.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), str(ready_file.absolute()), *names],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | child_environment,  # not by argv, which every user of the machine can read
            start_new_session=True,  # Ctrl-C reaches the trainer, which still needs scores to end in good order
        )
    try:
        yield wait_until_ready(child, ready_file, log_file, start_timeout_s), token
    finally:
        stop(child)
        ready_file.unlink(missing_ok=True)


def wait_until_ready(child: subprocess.Popen[bytes], ready_file: Path, log_file: Path, timeout_s: float) -> str:
    """The url of a server that was just started."""
    deadline = time.monotonic() + timeout_s
    while not ready_file.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            state = "did not start in time" if child.poll() is None else f"exited with code {child.returncode}"
            raise UserError(f"reward server: {state}: {lines[-1] if lines else 'no output'}; see {log_file}")
        time.sleep(0.05)
    url: str = json.loads(ready_file.read_text(encoding="utf-8"))["url"]
    return url


def stop(child: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """SIGTERM, and SIGKILL where that does not end the process in time."""
    child.terminate()
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def main(arguments: Sequence[str]) -> None:
    """The child of `launch_beside`: parent's pid, ready file, names of rewards; the token is in the environment."""
    parent, ready_file, *names = arguments
    die_with(int(parent))
    try:
        serve(names, "127.0.0.1", 0, os.environ.pop(TOKEN_VARIABLE, ""), Path(ready_file))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
