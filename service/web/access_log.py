"""Metrics of each request, and one line of JSON for it on standard output."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import lru_cache
from typing import Any, NamedTuple

from starlette.types import Scope

from service import metrics

# Polled every few seconds by machines: a line for each would bury the others.
_QUIET_ROUTES = ("/livez", "/readyz", "/metrics")
# Requests are counted and logged in batches: code that ran a moment ago costs half of what it
# costs after the caches have held images.
_WRITE_SECONDS = 0.05


class Answered(NamedTuple):
    """A request that has its answer: its Unix time, its route's path, and its seconds."""

    time: float
    request_id: str
    scope: Scope
    route: str
    status: int
    seconds: float


class AccessLog:
    """Collects answered requests and writes them a moment later."""

    def __init__(self, *, is_printed: bool) -> None:
        """With `is_printed` there are lines on standard output; metrics are always counted."""
        self._is_printed = is_printed
        self._answered: list[Answered] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, answered: Answered) -> None:
        metrics.note(metrics.REQUESTS, (answered.route, str(answered.status)))
        metrics.note(metrics.REQUEST_SECONDS, (answered.route,), answered.seconds)
        self._answered.append(answered)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_SECONDS, self.write)

    def write(self) -> None:
        """Write what was collected since the last time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        answered, self._answered = self._answered, []
        metrics.write_noted()
        if self._is_printed:
            # Not through `logging`, which costs more than the lines; and in one call, because
            # containers have Python's output unbuffered.
            sys.stdout.write("".join(_format(one) for one in answered if _is_shown(one)))
            sys.stdout.flush()


def _is_shown(answered: Answered) -> bool:
    return answered.route not in _QUIET_ROUTES or answered.status >= 400


def _format(answered: Answered) -> str:
    scope = answered.scope
    noted: dict[str, Any] = scope["state"]["log"]
    line = {
        "time": _utc(int(answered.time)),
        "id": answered.request_id,
        "client": scope["client"][0] if scope.get("client") else "",
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": answered.status,
        "ms": round(1000 * answered.seconds, 1),
        **{
            key: value if not isinstance(value, list) or len(value) != 1 else value[0]
            for key, value in noted.items()
        },
    }
    return json.dumps(line) + "\n"


@lru_cache(maxsize=1)
def _utc(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
