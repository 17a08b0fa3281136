"""HTTP for a server that trusts no sender: a request's headers must come soon and be few.

uvicorn bounds neither: a connection that sends a header line now and then, or headers without end,
would stay.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def strict_http(timeout_s: float, max_bytes: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with limits on the time and the bytes of each request's headers.

    Who takes longer is disconnected; who sends more gets 431. An idle connection is uvicorn's own
    affair (timeout_keep_alive), but for one that never began a request.
    """

    class StrictHttp(HttpToolsProtocol):
        # those of uvicorn, handed on as they are
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.in_head = False
            self.head_bytes = 0
            self.head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.in_head and not self.transport.is_closing():
                self.head_bytes += len(data)
                if self.head_bytes > max_bytes:
                    self.transport.write(
                        b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n"
                    )
                    self.transport.close()

        def _begin_head(self) -> None:
            self._end_head()
            self.in_head = True
            self.head_bytes = 0
            self.head_timer = self.loop.call_later(timeout_s, self.transport.close)

        def _end_head(self) -> None:
            self.in_head = False
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return StrictHttp
