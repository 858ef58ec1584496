"""How many bytes of request bodies may be in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import RequestError


class MemoryBudget:
    """The bytes of bodies that this process holds; what would exceed the limit is refused."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """One request's share, empty at first and released at the end."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            self.num_bytes -= reservation.num_bytes

    def add(self, num_bytes: int) -> None:
        """Raises RequestError (overloaded) beyond the limit."""
        if self.num_bytes + num_bytes > self._max_bytes:
            raise RequestError(
                "overloaded",
                "too many large requests are being sent; try again in 1 s",
                retry_after_seconds=1,
            )
        self.num_bytes += num_bytes


class Reservation:
    """One request's share of the budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises RequestError (overloaded) beyond the budget's limit."""
        self._budget.add(num_bytes)
        self.num_bytes += num_bytes
