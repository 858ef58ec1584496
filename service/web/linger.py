"""Closing a connection so that an answer sent before the request's body was read still arrives.

Where a connection ends with its request (the HTTP/1.0 of proxies, `Connection: close`), uvicorn
closes it right after the answer. If bytes are unread then, the kernel resets the connection, which
stops the client in the middle of sending and loses the answer. So the answer goes out at once, and
its end waits while the rest of the body is read and dropped, as nginx does (`lingering_close`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

# A client that is still sending is never silent for so long. One that waits for the answer before
# it sends, or has left, is not waited for.
_MAX_SILENCE_SECONDS = 1.0


class RequestBody:
    """The body of one request, which knows whether it was read to its end."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        headers = dict(scope["headers"])
        self.headers: Mapping[bytes, bytes] = headers
        self.is_read = b"content-length" not in headers and b"transfer-encoding" not in headers
        # On a connection that stays open, uvicorn itself reads and drops the rest.
        self._closes = (
            scope["http_version"] == "1.0" or b"close" in headers.get(b"connection", b"").lower()
        )

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body"):
            self.is_read = True
        return message

    def linger(self, send: Send, seconds: float) -> Send:
        """`send`, which holds the end of an answer back while a body that is unread still comes.

        It waits until the body is read, `seconds` have passed, or the client is silent. Where the
        connection stays open it does not wait.
        """

        async def send_and_linger(message: Message) -> None:
            is_end = message["type"] == "http.response.body" and not message.get("more_body")
            if not is_end or self.is_read or not self._closes:
                await send(message)
                return
            await send({**message, "more_body": True})
            await self._drop_rest(seconds)
            await send({"type": "http.response.body"})

        return send_and_linger

    async def _drop_rest(self, seconds: float) -> None:
        # Not in an `asyncio.timeout`: the `wait_for` of Python 3.11 loses a cancellation that comes
        # together with a message, and a client that sends without end would never be cut off.
        end = time.monotonic() + seconds
        with suppress(TimeoutError):
            while not self.is_read and (left := end - time.monotonic()) > 0:
                await asyncio.wait_for(self.receive(), min(left, _MAX_SILENCE_SECONDS))
