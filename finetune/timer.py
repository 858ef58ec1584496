"""Seconds of a step, taken by a `with` statement."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self


class Timer:
    """Seconds that the block took, or takes so far, on top of those of earlier processes."""

    def __init__(self, earlier_seconds: float = 0.0) -> None:
        self._before = earlier_seconds
        self._entered: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._entered is None else time.perf_counter() - self._entered
        return self._before + running

    def __enter__(self) -> Self:
        self._entered = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._before, self._entered = self.seconds, None
