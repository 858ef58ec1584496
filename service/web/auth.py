"""Bearer tokens."""

from __future__ import annotations

import hmac

from pydantic import SecretStr
from starlette.requests import Request

from service.errors import RequestError
from service.inference.server import Server
from service.web.route import Route


def _check_token(request: Request, route: Route, server: Server) -> None:
    if route.needs == "nothing":
        return
    tokens = [server.settings.admin_token]
    if route.needs == "api_token":
        if server.settings.api_token is None:
            return
        tokens.append(server.settings.api_token)
    elif server.settings.admin_token is None:
        raise RequestError(
            "forbidden",
            "administration over HTTP is switched off; start the server with GRAFT_ADMIN_TOKEN",
        )
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not any(_is_same(given.strip(), token) for token in tokens):
        raise RequestError(
            "unauthorized", "send the token of this server: Authorization: Bearer <token>"
        )


def _is_same(given: str, token: SecretStr | None) -> bool:
    """In a time that does not tell how much of it was right."""
    return token is not None and hmac.compare_digest(
        given.encode("utf-8", "replace"), token.get_secret_value().encode()
    )
