"""A client for benchmarks that sends encoded requests and reads answers.

It takes little processor time, because the server shares the cores.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar, cast

import httptools
import uvloop

# An answer that takes longer has been given up by any client.
TIMEOUT_SECONDS = 30.0

T = TypeVar("T")
# Takes an answer's status and body.
Answered = Callable[[int, bytes], None]


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on uvloop; SIGTERM ends it and the process.

    An ordinary signal handler would not do: uvloop drops what it raises inside a callback.
    """
    handler = signal.getsignal(signal.SIGTERM)

    async def until_terminated() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return uvloop.run(until_terminated())
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    finally:
        # The loop took it and gives back the system's own.
        signal.signal(signal.SIGTERM, handler)


class Client:
    """Sends encoded requests to one server, each on a connection that no other uses at the time."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._idle: list[_Connection] = []

    async def send(
        self, request: bytes, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> tuple[int, bytes]:
        """The answer's status and body; status 0 without an answer in time."""
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

        def answered(status: int, body: bytes) -> None:
            if not answer.done():
                answer.set_result((status, body))

        connection = None
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = self._take_idle() or await self._connect()
                connection.ask(request, answered)
                return await answer
        except (TimeoutError, OSError):
            if connection is not None:
                connection.close()
            return 0, b""

    def start(self, request: bytes, answered: Answered) -> None:
        """Send without a task, which would cost more than sending; `answered` is called later."""
        if connection := self._take_idle():
            connection.ask(request, answered)
            return
        connecting = asyncio.ensure_future(self._connect())
        connecting.add_done_callback(partial(_ask_when_connected, request, answered))

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            partial(_Connection, self._idle), self._host, self._port
        )
        return connection


def _ask_when_connected(
    request: bytes, answered: Answered, connecting: asyncio.Task[_Connection]
) -> None:
    if connecting.cancelled() or connecting.exception() is not None:
        answered(0, b"")
    else:
        connecting.result().ask(request, answered)


class _Connection(asyncio.Protocol):
    """One request at a time over one connection."""

    def __init__(self, idle: list[_Connection]) -> None:
        """`idle` is where it goes after each answer, to be used again."""
        self.is_open = False
        self._idle = idle
        self._transport: asyncio.Transport | None = None
        self._answered: Answered | None = None
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes, answered: Answered) -> None:
        """Call `answered` once with status and body; with 0 if the connection closes before."""
        assert self._transport is not None
        self._answered = answered
        self._body = []
        self._transport.write(request)

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are none of asyncio's classes.
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(0)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.should_keep_alive():
            self._idle.append(self)
        else:
            self.close()
        self._end(self._parser.get_status_code())

    def _end(self, status: int) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(status, b"".join(self._body))


def encode_get(target: str) -> bytes:
    """A GET request as it goes over the wire."""
    return f"GET {target} HTTP/1.1\r\nHost: benchmark\r\n\r\n".encode()
