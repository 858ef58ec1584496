"""An answer that comes before the request's body was read must still arrive.

Where a connection ends with its request (proxies' HTTP/1.0, `Connection: close`), uvicorn closes it right after the answer. With
bytes unread the kernel makes a reset of that, which stops the client in the middle of sending and takes the answer along. So the
answer goes out at once, and its end waits while what still comes is thrown away, as nginx does (`lingering_close`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

# Who is still sending is not silent for so long; who waits for the answer before sending, or has left, is not waited for.
_MAX_SILENCE_SECONDS = 1.0


class RequestBody:
    """The body of one request: knows whether it was read to its end."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        headers = dict(scope["headers"])
        self.headers: Mapping[bytes, bytes] = headers
        self.is_read = b"content-length" not in headers and b"transfer-encoding" not in headers
        # On a connection that stays, uvicorn itself throws away what still comes.
        self._is_last = (
            scope["http_version"] == "1.0" or b"close" in headers.get(b"connection", b"").lower()
        )

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body"):
            self.is_read = True
        return message

    @property
    def must_linger(self) -> bool:
        """Whether the connection would be closed right after an answer that is sent now, with some of the body unread."""
        return self._is_last and not self.is_read

    def linger(self, send: Send, seconds: float) -> Send:
        """`send`, with the end of the answer held back until the body is read, or `seconds` or a silence have passed."""

        async def send_and_linger(message: Message) -> None:
            if self.is_read or message["type"] != "http.response.body" or message.get("more_body"):
                await send(message)
                return
            await send({**message, "more_body": True})
            await self._throw_away(seconds)
            await send({"type": "http.response.body"})

        return send_and_linger

    async def _throw_away(self, seconds: float) -> None:
        # No `asyncio.timeout` around it: Python 3.11's `wait_for` loses a cancellation that comes together with a message, and who sends
        # without end would never be let go.
        end = time.monotonic() + seconds
        with suppress(TimeoutError):
            while not self.is_read and (left := end - time.monotonic()) > 0:
                await asyncio.wait_for(self.receive(), min(left, _MAX_SILENCE_SECONDS))
