"""A client that sends without end is cut off at the limit, whenever its messages arrive."""

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
    """Ten times: in a timeout, Python 3.11's `wait_for` loses one that comes with a message."""
    for _ in range(10):
        sent, seconds = asyncio.run(linger(0.02))
        assert [message.get("body") for message in sent] == [b"no", None]
        assert sent[0]["more_body"]
        assert 0.02 <= seconds < 2
