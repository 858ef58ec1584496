"""Who sends without end is let go at the limit, however his messages fall together with it."""

from __future__ import annotations

import asyncio
import time

import pytest
from starlette.types import Message

from service.web.linger import RequestBody

CLOSING = {
    "type": "http",
    "http_version": "1.1",
    "headers": [(b"connection", b"close"), (b"content-length", b"1000000000")],
}


async def send_more() -> Message:
    await asyncio.sleep(0)
    return {"type": "http.request", "body": b"more", "more_body": True}


async def linger(seconds: float) -> tuple[list[Message], float]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    started = time.monotonic()
    body = RequestBody(CLOSING, send_more)
    await asyncio.wait_for(
        body.linger(send, seconds)({"type": "http.response.body", "body": b"no"}), 5
    )
    return sent, time.monotonic() - started


@pytest.mark.alone
def test_messages_that_never_pause_do_not_outlast_the_limit() -> None:
    """Ten times: with a timeout around `wait_for`, Python 3.11 loses the one that comes together with a message."""
    for _ in range(10):
        sent, seconds = asyncio.run(linger(0.02))
        assert [message.get("body") for message in sent] == [b"no", None]
        assert sent[0]["more_body"]
        assert 0.02 <= seconds < 2
