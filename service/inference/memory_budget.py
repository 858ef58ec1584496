"""How many bytes of uploads may be in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import RequestError


class Buffered:
    """How many bytes of bodies this process holds; beyond the limit requests are refused, so that memory stays bounded."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        hold = Hold(self)
        try:
            yield hold
        finally:
            self.num_bytes -= hold.num_bytes

    def add(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self._max_bytes:
            raise RequestError(
                "overloaded",
                "too many large requests are being sent; try again in 1 s",
                retry_after_seconds=1,
            )
        self.num_bytes += num_bytes


class Hold:
    """One request's share of what is buffered, given back when it ends."""

    def __init__(self, buffered: Buffered) -> None:
        self._buffered = buffered
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._buffered.add(num_bytes)
        self.num_bytes += num_bytes
