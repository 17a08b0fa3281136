"""HTTP for a server that trusts no sender: every state of a connection ends within its time.

uvicorn bounds little of it: a connection that sends a header line now and then, headers without
end, or a byte after its answer would stay. Here one timer runs in each state and starts when the
state begins, never when bytes come; `guests.py` bounds the connections without the token.
"""

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastgrpo.rewards.serving.server.admission import LONGEST_S, Limits, carries_token
from fastgrpo.rewards.serving.server.guests import Guests

KEEP_ALIVE_S = 75
"""Longer than the client keeps a connection: the client, not the server, ends an idle one."""


class State(Enum):
    """What a connection waits for."""

    HEAD = "a request's headers"
    ANSWER = "the answer to a request, whose body may still come"
    REST = "the rest of a body whose request has been answered"
    IDLE = "the next request"


@dataclass(frozen=True)
class Rules:
    """What all connections of a server share."""

    limits: Limits
    token: str
    guests: Guests

    def seconds(self, state: State, guest: bool) -> float:
        """How long a connection may be in a state."""
        if guest:  # it is answered at once, and its bodies are not read
            return self.limits.head_timeout_s
        return {
            State.HEAD: self.limits.head_timeout_s,
            State.ANSWER: LONGEST_S + self.limits.room_wait_s + self.limits.body_timeout_s,
            State.REST: self.limits.body_timeout_s,
            State.IDLE: KEEP_ALIVE_S,
        }[state]


class StrictHttp(HttpToolsProtocol):
    """One connection: its state, and whether it has shown the token."""

    rules: Rules

    # those of uvicorn, handed on as they are
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.guest = True
        self.in_head = True
        self.in_body = False
        self.unanswered = 0  # requests; more than one where a sender does not wait
        self.head_bytes = 0
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.rules.guests.enter(self, self.client[0] if self.client else "", transport.abort)
        self._begin_state()

    def connection_lost(self, exc: Exception | None) -> None:
        self.rules.guests.leave(self)
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_head, self.head_bytes = True, 0
        self._begin_state()

    def on_headers_complete(self) -> None:
        self.in_head, self.in_body = False, True
        self.unanswered += 1
        if self.guest and any(
            name == b"authorization" and carries_token(value, self.rules.token)
            for name, value in self.headers
        ):
            self.guest = False
            self.rules.guests.leave(self)
        self._begin_state()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.in_body = False
        self._begin_state()

    def on_response_complete(self) -> None:
        self.unanswered -= 1
        self._begin_state()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_head and not self.transport.is_closing():
            self.head_bytes += len(data)
            if self.head_bytes > self.rules.limits.max_head:
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n"
                )
                self.transport.close()

    @property
    def state(self) -> State:
        if self.unanswered:
            return State.ANSWER
        if self.in_body:
            return State.REST
        return State.HEAD if self.in_head else State.IDLE

    def _begin_state(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        seconds = self.rules.seconds(self.state, self.guest)
        # not closed: that would wait for a peer that does not read what was written
        self.timer = self.loop.call_later(seconds, self.transport.abort)


def strict_http(limits: Limits, token: str) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with limits on the time of every state and on each request's headers.

    Who takes longer is disconnected; who sends longer headers gets 431.
    """

    class Connection(StrictHttp):
        rules = Rules(limits, token, Guests(limits.max_guests, limits.max_guests_per_address))

    return Connection
