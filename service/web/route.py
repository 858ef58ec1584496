"""A route of the service, as data."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.server import Server
from service.web.responses import graft_error

Handler = Callable[[Request, Server], Awaitable[Response]]
ErrorBody = Callable[[RequestError], dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """One address: `path` may have `{name}` parts, which match anything but `/` and `:`."""

    method: Literal["GET", "POST", "PATCH"]
    path: str
    handler: Handler
    needs: Literal["nothing", "api_token", "admin_token"] = "api_token"
    error_body: ErrorBody = graft_error

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return self._compile("[^/:]+")

    @cached_property
    def loose_pattern(self) -> re.Pattern[str]:
        """What was meant for this route, but has a part that no name has."""
        return self._compile(".+")

    def _compile(self, part: str) -> re.Pattern[str]:
        return re.compile(
            re.sub(r"\\\{(\w+)\\\}", rf"(?P<\1>{part})", re.escape(self.path)), re.DOTALL
        )


def _takes(route: Route, method: str) -> bool:
    return method == route.method or (method == "HEAD" and route.method == "GET")
