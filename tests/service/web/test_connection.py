"""An answer reaches the socket in one write, and leaves uvicorn's connection as its own sending would."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.web.connection import keep_connection, send_whole

REQUEST = b"%b /%b HTTP/1.1\r\nHost: test\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    response = Response(b"" if scope["path"] == "/empty" else b"whole")
    keep_connection(send, 0.2 if scope["path"] == "/brief" else 60)
    await send_whole(response, scope, receive, send)


@contextmanager
def counted_writes() -> Iterator[list[bytes]]:
    """What uvicorn's connections write, piece by piece."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    written: list[bytes] = []
    connection_made = HttpToolsProtocol.connection_made

    class Counting:
        def __init__(self, transport: Any) -> None:
            self._transport = transport

        def write(self, data: bytes) -> None:
            written.append(data)
            self._transport.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

    def made(self: Any, transport: Any) -> None:
        connection_made(self, Counting(transport))  # type: ignore[arg-type]

    HttpToolsProtocol.connection_made = made  # type: ignore[method-assign]
    try:
        yield written
    finally:
        HttpToolsProtocol.connection_made = connection_made  # type: ignore[method-assign]


@asynccontextmanager
async def serve() -> AsyncIterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, http="httptools", lifespan="off", log_level="critical")
        )
        serving = asyncio.create_task(server.serve([listening]))
        yield listening.getsockname()
        server.should_exit = True
        await serving


async def ask(*paths: bytes, methods: Sequence[bytes] = (b"GET", b"GET")) -> list[bytes]:
    """The pieces that the server writes for these requests, sent at once over one connection, the last of which closes it."""
    with counted_writes() as written:
        async with serve() as address:
            reader, writer = await asyncio.open_connection(*address)
            *others, last = (
                REQUEST % (method, path) for method, path in zip(methods, paths, strict=True)
            )
            writer.write(
                b"".join(others) + last.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            )
            received = await asyncio.wait_for(reader.read(), 10)
            writer.close()
    assert b"".join(written) == received, "nothing is left behind, and nothing comes twice"
    return written


def test_head_and_body_are_connection() -> None:
    first, second = asyncio.run(ask(b"whole", b"whole"))
    for answer in (first, second):
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nwhole")


def test_an_answer_without_a_body_is_sent_too() -> None:
    empty, whole = asyncio.run(ask(b"empty", b"whole"))
    assert empty.endswith(b"\r\n\r\n")
    assert whole.endswith(b"whole")


def test_the_answer_to_head_has_no_body() -> None:
    head, whole = asyncio.run(ask(b"whole", b"whole", methods=(b"HEAD", b"GET")))
    assert b"content-length: 5\r\n" in head
    assert head.endswith(b"\r\n\r\n")
    assert whole.endswith(b"whole")


def test_the_last_answer_says_so() -> None:
    first, last = asyncio.run(ask(b"whole", b"whole"))
    assert b"connection: close\r\n" not in first
    assert b"connection: close\r\n" in last


def test_a_connection_is_closed_after_the_silence_that_was_asked_for() -> None:
    async def seconds_open(path: bytes) -> float:
        async with serve() as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(REQUEST % (b"GET", path))
            await reader.readuntil(b"whole")
            started = time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    assert await reader.read() == b""
            writer.close()
            return time.monotonic() - started

    assert 0.15 < asyncio.run(seconds_open(b"brief")) < 0.9
    assert asyncio.run(seconds_open(b"whole")) >= 1
