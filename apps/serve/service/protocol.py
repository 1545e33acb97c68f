"""HTTP as uvicorn speaks it, with bounds on connections and on a request's head, of which uvicorn has none.

The parser is httptools. h11, which bounds the bytes of a head, took 130 to 380 us more of the processor for a request
(2026-11-30), and does not bound its time either.
"""

from __future__ import annotations

import asyncio
import json
import socket
from asyncio import TimerHandle, Transport
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from apps.base.ports import take_no_more
from apps.serve.service.options import Limits


def server_of(app: Any, limits: Limits) -> Any:
    """Return the uvicorn server of ``app``, which prints nothing but errors."""
    http = type("Protocol", (BoundedProtocol,), {"limits": limits})
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
    return EndingServer(uvicorn.Config(app, http=http, ws="none", lifespan="on", **quiet))


class EndingServer(uvicorn.Server):
    """A server that ends without a reset. uvicorn resets clients that wait at its socket or whose request is coming."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody in, answer who is there within a second, and close."""
        self.config.http_protocol_class.ends = True  # type: ignore[union-attr]
        for own in sockets or ():
            take_no_more(own)
        for tick in range(50):
            silent = any(own.cycle is None or own.cycle.response_complete for own in self.server_state.connections)  # type: ignore
            if self.force_exit or (tick > 4 and not silent):
                break
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


class BoundedProtocol(HttpToolsProtocol):
    """A connection that waits for a request's head for a limited time, and for a limited number of bytes.

    If there are too many connections, the one that has waited longest is closed.

    Attributes:
        limits: of the service.
        ends: whether the service is ending.
    """

    limits: Limits
    ends = False
    _deadline: TimerHandle
    _unread = 0

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limits.requests + self.limits.waiting:
            waiting = [own for own in self.connections if not own._deadline.cancelled()]
            min(waiting, key=lambda own: own._deadline.when())._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)  # until there is a whole head, or some of a body
        super().data_received(data)
        if self._unread > self.limits.head and not self.transport.is_closing():
            self.send_400_response(f"the head of a request has at most {self.limits.head} bytes", 431)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._deadline.cancel()
        super().on_headers_complete()
        if self.ends:  # the answer says that it is the last one
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # else the next one is at work
            self._wait()

    def send_400_response(self, msg: str, status: int = 400) -> None:
        body = json.dumps({"error": msg}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._close()

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self.limits.head_seconds, self._close)

    def _close(self) -> None:
        self.connections.discard(self)
        self.transport.close()
