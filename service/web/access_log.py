"""One line of JSON a request, and its metrics."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any, NamedTuple

from starlette.types import Scope

# Asked every few seconds by machines; a line for each would bury the others.
_METRICS_ROUTE = "/metrics"
_QUIET_ROUTES = ("/livez", "/readyz", _METRICS_ROUTE)
_OTHER = "other"
# Requests are counted and logged a few at a time: code that has just run costs half of what it costs between two images.
_RECORD_SECONDS = 0.05


class _Answered(NamedTuple):
    """A request that has its answer."""

    time: float
    id: str
    scope: Scope
    route: str
    status: int
    seconds: float


def _log_line(answered: _Answered) -> str:
    scope = answered.scope
    noted: dict[str, Any] = scope["state"]["log"]
    line = {
        "time": _utc(int(answered.time)),
        "id": answered.id,
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
