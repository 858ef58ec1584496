"""uvicorn's connection, below ASGI: an answer goes out in one write, head and body together.

uvicorn writes them one after the other, and uvloop each of them at once: two system calls and two packets for what the client waits
for together. Between them it looks through every header for what ours never hold, which is a fifth of what a refusal costs.
"""

from __future__ import annotations

from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)


def keep_connection(send: Send, seconds: float) -> None:
    """Keep the connection that `send`, uvicorn's own, belongs to for `seconds` of silence."""
    cycle = getattr(send, "__self__", None)
    if isinstance(cycle, RequestResponseCycle):
        protocol = cast(HttpToolsProtocol, cycle.on_response.__self__)  # type: ignore[attr-defined]
        protocol.timeout_keep_alive = seconds  # type: ignore[assignment]


async def send_whole(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send `response`, whose body is all there.

    Header values must be safe as they are: nothing of a request may be in them unchecked. Where `send` is not uvicorn's own, because a
    middleware stands between, the response is sent through that as any other.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        await response(scope, receive, send)
        return
    if cycle.flow.write_paused and not cycle.disconnected:
        await cycle.flow.drain()
    if cycle.disconnected:
        return
    parts = [STATUS_LINE[response.status_code]]
    for name, value in (*cycle.default_headers, *response.raw_headers):
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    if scope["method"] != "HEAD":
        parts.append(bytes(response.body))
    # From here on what its `send` does at an answer's end.
    cycle.response_started = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(b"".join(parts))
    cycle.response_complete = True
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
