"""A stub of an OpenAI-compatible endpoint: a real HTTP server with planted log-probabilities."""

import base64
import io
import json
import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "stub-vl"
LISTED = 0.9  # probability of yes and no together


@dataclass(frozen=True)
class Reply:
    """What the stub does with one request, in place of a good answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    late_s: float = 0.0  # before anything is said
    cut: int | None = None  # bytes of the body after which the connection is reset
    drip_s: float = 0.0  # between single bytes of the body


def completion(words: Mapping[str, float]) -> bytes:
    """An answer whose first token has these probabilities."""
    listed = [
        {"token": token, "logprob": math.log(p) if p else -9999.0, "bytes": [*token.encode()]}
        for token, p in words.items()
    ]
    content = [{"token": listed[0]["token"], "logprob": -1.0, "top_logprobs": listed}]
    choice = {"index": 0, "message": {"content": "x"}, "logprobs": {"content": content}}
    return json.dumps({"id": "1", "model": MODEL, "choices": [choice]}).encode()


def brightness(asked: Mapping[str, Any]) -> float:
    """Mean of a request's pictures, 0 to 1."""
    parts = asked["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    stills = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return float(np.mean([np.asarray(still, dtype=np.float64) for still in stills]) / 255)


def bright(asked: Mapping[str, Any]) -> Mapping[str, float]:
    """P(yes) : P(no) as bright : dark, over several spellings."""
    light = brightness(asked)
    yes, no = LISTED * light, LISTED * (1 - light)
    spelt = {
        "Yes": 0.5 * yes,
        " yes": 0.3 * yes,
        "ĠYES": 0.2 * yes,
        "No": 0.75 * no,
        "▁no": 0.25 * no,
    }
    return {"Well": 0.05} | spelt


class Stub:
    """The endpoint: answers by `answer`, after the replies of `script`, one for each request."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> None:
        self.answer = answer
        self.script: deque[Reply] = deque()
        self.always: Reply | None = None  # for every request that `script` has none for
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    @property
    def texts(self) -> list[str]:
        """The questions, as they were sent."""
        return [asked["messages"][0]["content"][-1]["text"] for asked in self.asked]

    def reply(self, asked: dict[str, Any], key: str | None) -> Reply:
        """What comes of a request."""
        self.asked.append(asked)
        self.keys.append(key)
        try:
            return self.script.popleft()
        except IndexError:
            pass
        return self.always or Reply(body=completion(self.answer(asked)))


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/chat/completions", self.path
            reply = stub.reply(json.loads(body), self.headers.get("Authorization"))
            time.sleep(reply.late_s)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if reply.cut is not None:
                self.wfile.write(reply.body[: reply.cut])
                self.wfile.flush()
                # a reset, not an orderly end
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                return
            pieces = [reply.body[i : i + 1] for i in range(len(reply.body))]
            for piece in pieces if reply.drip_s else [reply.body]:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(reply.drip_s)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that would not wait is no error of the stub's."""


@contextmanager
def running(
    answer: Callable[[Mapping[str, Any]], Mapping[str, float]] = bright, port: int = 0
) -> Iterator[Stub]:
    """A stub in threads of this process."""
    stub = Stub(answer)
    with _Quiet(("127.0.0.1", port), _handler(stub)) as server:
        stub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()


@cache
def shared() -> str:
    """The address of a stub that lives as long as this process."""
    stub = Stub(bright)
    server = _Quiet(("127.0.0.1", 0), _handler(stub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def refused() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
