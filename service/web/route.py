"""A route of the service as data: address, handler, required token, shape of its errors."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.server import Server
from service.web.auth import Access
from service.web.responses import graft_error

Handler = Callable[[Request, Server], Awaitable[Response]]
ErrorBody = Callable[[RequestError], dict[str, Any]]

_PARAMETER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Route:
    """One address. A `{name}` part of `path` matches anything but `/` and `:`."""

    method: Literal["GET", "POST", "PATCH"]
    path: str
    handler: Handler
    needs: Access = "api_token"
    error_body: ErrorBody = graft_error
    query: Sequence[str] | None = None
    """The parameters that the query may have; None where it is not looked at."""

    @property
    def parameters(self) -> list[str]:
        """The names of the `{name}` parts, in order."""
        return _PARAMETER.findall(self.path)
