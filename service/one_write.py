"""An answer's head goes out with its body, in one write.

uvicorn writes them one after the other, and uvloop each of them at once: two system calls and two packets for what the client waits
for together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class _Transport:
    """Another transport whose first write waits for the second, for the time of one answer."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self._has_head = False

    def write(self, data: bytes) -> None:
        if not self._has_head:
            self._head, self._has_head = data, True
            return
        self._transport.write(self._take_head() + data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        if head := self._take_head():
            self._transport.write(head)

    def _take_head(self) -> bytes:
        head, self._head = self._head or b"", None
        return head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@contextmanager
def head_with_body(send: Send) -> Iterator[None]:
    """While an answer is sent by `send`; where that is not uvicorn's own, because a middleware stands between, nothing is changed."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        yield
        return
    theirs = cycle.transport
    ours = _Transport(theirs)
    cycle.transport = cast(asyncio.Transport, ours)
    try:
        yield
    finally:
        cycle.transport = theirs
        ours.flush()
