"""Checks of a request before its body is read: the token, an honest length, room for the body."""

import asyncio
import hmac
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from fastgrpo.rewards.serving import wire

LONGEST_S = 3600.0
"""Seconds that a sender may wait for its answer."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what a server takes on."""

    max_body: int = wire.MAX_BODY  # bytes of one request
    max_waiting: int = 4 * wire.MAX_BODY  # bytes of all requests that are read or wait to be scored
    max_working: int = 4 * 2**30  # bytes that judging a batch takes, as its reward declares
    room_wait_s: float = 5.0  # for room, before a request is turned away
    max_guests: int = 256  # connections that have not shown the token
    max_guests_per_address: int = 64
    body_timeout_s: float = 60.0  # for a body to arrive
    head_timeout_s: float = 10.0  # for a request's headers to arrive
    max_head: int = 64 * 2**10  # bytes of a request's headers
    batch_wait_s: float = 0.01  # how long a clip may wait for others of its shape
    drain_s: int = 60  # for what was accepted, from the signal that ends the server on


class Refusal(HTTPException):
    """An answer instead of scores.

    The connection ends where a body may follow that nobody will read.
    """

    def __init__(
        self, status: int, detail: str, close: bool = True, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(
            status, detail, (headers or {}) | ({"Connection": "close"} if close else {})
        )


def draining() -> Refusal:
    """The answer where a server ends before it has scored: another replica will."""
    return Refusal(503, "ending; ask another server", headers={"Retry-After": "1"})


class Admission:
    """The bytes of all requests that are being read or wait to be scored, held below a bound.

    A request for which there is no room waits a while, first come first served, before its body is
    read: its bytes then stay with the sender. Lives on an event loop.
    """

    def __init__(self, most: int, wait_s: float) -> None:
        self.most = most
        self.wait_s = wait_s
        self.bytes = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, length: int, longest: float = math.inf) -> AsyncIterator[None]:
        """Keep room for a request of that many bytes.

        Raises Refusal 429 where there is none in time.
        longest: seconds that this request may wait, where that is less than `wait_s`
        """
        if self._queue or not self._fits(length):
            await self._turn(length, min(self.wait_s, longest))
        else:
            self.bytes += length
        try:
            yield
        finally:
            self.bytes -= length
            self._admit()

    def _fits(self, length: int) -> bool:
        return not self.bytes or self.bytes + length <= self.most

    async def _turn(self, length: int, wait_s: float) -> None:
        """Wait until it is this request's turn, which has then got its room."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((length, turn))
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except TimeoutError:
            if turn.cancelled():
                self._admit()  # it may have stood before smaller ones, for which there is room
                # Not closed: the sender, which is a friend, would lose this answer in the reset of
                # its connection.
                raise Refusal(
                    429, "too many clips are waiting", close=False, headers={"Retry-After": "1"}
                ) from None

    def _admit(self) -> None:
        """Let those in whose turn it is."""
        while self._queue and (self._queue[0][1].done() or self._fits(self._queue[0][0])):
            length, turn = self._queue.popleft()
            if not turn.done():
                self.bytes += length
                turn.set_result(None)


def authenticate(request: Request, token: str) -> None:
    """Refuse with 401 unless the request carries the token."""
    given = request.headers.get("authorization", "")
    if not carries_token(given.encode("latin-1"), token):
        raise Refusal(401, "wrong token", headers={"WWW-Authenticate": "Bearer"})


def carries_token(authorization: bytes, token: str) -> bool:
    """Whether a header `Authorization` has the token.

    The comparison takes the same time however much of the token is right.
    """
    return hmac.compare_digest(authorization, f"Bearer {token}".encode())


def body_length(request: Request, most: int) -> int:
    """The declared length of the body, bytes, which must be at most `most`."""
    if request.headers.get("content-type") != wire.CONTENT_TYPE:
        raise Refusal(415, f"expected Content-Type: {wire.CONTENT_TYPE}")
    declared = request.headers.get("content-length")
    if declared is None or not declared.isascii() or not declared.isdigit():
        raise Refusal(411, "Content-Length is required")
    if len(declared) > 18 or int(declared) > most:
        raise Refusal(
            413,
            f"body of {declared[:18]} bytes, above {most}; send fewer or smaller clips per request",
        )
    return int(declared)


def patience(request: Request, longest: float = LONGEST_S) -> float:
    """Seconds that the sender waits for its answer, by its header `X-Timeout-S`.

    longest: seconds where the header is missing
    """
    text = request.headers.get("x-timeout-s", "")
    try:
        seconds = float(text) if text else longest
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= longest:
        raise Refusal(400, f"X-Timeout-S is not a number above 0 and at most {longest:g}")
    return seconds


async def read_body(request: Request, length: int, timeout_s: float) -> bytearray:
    """The body, within the time limit.  Raises WireError where it is not as long as declared."""
    body = bytearray()  # grown as it comes: a length that was only claimed takes no memory
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > length:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body took longer than {timeout_s:g} s") from None
    except ClientDisconnect:
        raise wire.WireError("body: the client went away") from None
    if len(body) != length:
        raise wire.WireError(f"body: {len(body)} bytes where Content-Length says {length}")
    return body
