"""An answer reaches the socket in one write, as uvicorn's own connection writes it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.one_write import head_with_body

REQUEST = b"GET /%b HTTP/1.1\r\nHost: test\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    response: Response = Response(b"" if scope["path"] == "/empty" else b"whole")
    if scope["path"] == "/parts":
        response = StreamingResponse(iter((b"one", b"two", b"three")))
    with head_with_body(send):
        await response(scope, receive, send)


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

    HttpToolsProtocol.connection_made = lambda self, transport: connection_made(self, Counting(transport))  # type: ignore[method-assign, arg-type, assignment]
    try:
        yield written
    finally:
        HttpToolsProtocol.connection_made = connection_made  # type: ignore[method-assign]


async def ask(*paths: bytes) -> list[bytes]:
    """The pieces that the server writes for these requests, sent at once over one connection, the last of which closes it."""
    with counted_writes() as written, socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http="httptools", lifespan="off", log_level="critical"))
        serving = asyncio.create_task(server.serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        *others, last = (REQUEST % path for path in paths)
        writer.write(b"".join(others) + last.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        server.should_exit = True
        await serving
    assert b"".join(written) == received, "nothing is left behind, and nothing comes twice"
    return written


def test_head_and_body_are_one_write() -> None:
    first, second = asyncio.run(ask(b"whole", b"whole"))
    for answer in (first, second):
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nwhole")


def test_an_answer_without_a_body_is_sent_too() -> None:
    empty, whole = asyncio.run(ask(b"empty", b"whole"))
    assert empty.endswith(b"\r\n\r\n")
    assert whole.endswith(b"whole")


def test_what_comes_in_parts_is_not_held_back_beyond_its_head() -> None:
    pieces = asyncio.run(ask(b"parts"))
    assert len(pieces) == 4, "the head goes with the first of three parts and their end"
    assert b"one" in pieces[0]
    assert b"two" not in pieces[0]
