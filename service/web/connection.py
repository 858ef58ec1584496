"""A client's connection: uvicorn's, and what it lacks (0.54).

- A request that offers an upgrade (`Upgrade: h2c`, as Java's HttpClient, Spring, Ktor and
  `curl --http2` do) is answered as HTTP/1.1, as RFC 9110, 7.8, lets a server choose. In uvicorn it
  loses its body (encode/uvicorn#2722): the parser stops after the headers of such a request.
- Headers have a limit of time and one of size. uvicorn waits for them without end.
- What is no request gets its error in JSON.

BentoML 1.4.39 has no option for uvicorn's `http`, so `use_connections` takes the place of uvicorn's
default. That table and the attributes of `HttpToolsProtocol` are private interfaces:
tests/service/web/test_connection.py fails when they change.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service import metrics
from service.errors import STATUS_BY_CODE, RequestError
from service.web.responses import graft_error

# As h11 has it; most servers take 8 to 16 KiB.
_MAX_HEADER_BYTES = 64 * 2**10


def use_connections(header_seconds: float) -> None:
    """Have uvicorn use `Connection` in this process, with this limit for a request's headers."""
    Connection.header_seconds = header_seconds
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


class _Parser(httptools.HttpRequestParser):
    """Parses the headers of a request that offers an upgrade a second time, without the offer."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        # As uvicorn has it: a client may send on after `Connection: close`.
        self.set_dangerous_leniencies(lenient_data_after_close=True)
        self._connection = connection

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        parser = self
        while True:
            try:
                super(_Parser, parser).feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                (end,) = offer.args
                data = self._connection.head_without_offer() + data[end:]
                # A new one: after a request with `Connection: close` the old one reads no other.
                parser = self._connection.parser = _Parser(self._connection)


class Connection(HttpToolsProtocol):
    """One connection, which while nothing is being answered waits for a limited time.

    Between two requests uvicorn's keep-alive timer runs; from the connection's start, or from the
    first byte of a request, to the end of its headers `header_seconds`.
    """

    header_seconds: float

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = _Parser(self)
        self._is_in_headers = False
        self._num_header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers:
            self._num_header_bytes += len(data)
        # It stops the keep-alive timer.
        super().data_received(data)
        if self._is_in_headers and self._num_header_bytes > _MAX_HEADER_BYTES:
            self._refuse(
                RequestError(
                    "headers_too_large",
                    f"the headers are larger than {_MAX_HEADER_BYTES} bytes; send what is long in "
                    "the body",
                )
            )
        if self._is_idle() and self.timeout_keep_alive_task is None and self._timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_headers = True
        self._num_header_bytes = 0

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._stop_timer()
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        # The rest of a body that was answered before it was read: uvicorn has dropped it, and
        # starts no timer.
        if self._is_idle():
            self._stop_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def head_without_offer(self) -> bytes:
        """The first line and headers that were just parsed, without `Upgrade`.

        Raises HttpParserError for CONNECT, which is for proxies.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT")
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % pair for pair in self.headers if pair[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            RequestError(
                "bad_request",
                "this is not an HTTP/1.1 request: its first line or a header is broken, or it is "
                "HTTP/2 or TLS, which this port does not speak",
            )
        )

    def _is_idle(self) -> bool:
        """Whether nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self._is_in_headers:
            # Nothing to answer: silence, or the rest of a body that was answered already.
            self.transport.close()
            return
        self._refuse(
            RequestError(
                "header_timeout",
                f"the headers did not arrive within {self.header_seconds:g} s "
                "(GRAFT_HEADER_SECONDS)",
            )
        )

    def _refuse(self, error: RequestError) -> None:
        """Answer what has not become a request, and close the connection."""
        if self.transport.is_closing():
            return
        metrics.note(metrics.REJECTED, (error.code, "", ""))
        status = HTTPStatus(STATUS_BY_CODE[error.code])
        body = json.dumps(graft_error(error)).encode()
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
