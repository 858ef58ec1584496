"""Bearer tokens."""

from __future__ import annotations

import hmac
from typing import Literal

from pydantic import SecretStr

from service.errors import RequestError

Access = Literal["nothing", "api_token", "admin_token"]


def check_token(
    authorization: str, needs: Access, *, api_token: SecretStr | None, admin_token: SecretStr | None
) -> None:
    """Raise RequestError unless the `Authorization` header holds a token that `needs` accepts.

    The admin token is accepted wherever the API token is. Without an API token predictions are
    open; without an admin token administration is switched off.
    """
    if needs == "nothing" or (needs == "api_token" and api_token is None):
        return
    if needs == "admin_token" and admin_token is None:
        raise RequestError(
            "forbidden",
            "administration over HTTP is switched off; start the server with GRAFT_ADMIN_TOKEN",
        )
    accepted = [admin_token] if needs == "admin_token" else [admin_token, api_token]
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not any(_equal(given.strip(), token) for token in accepted):
        raise RequestError(
            "unauthorized", "send the token of this server: Authorization: Bearer <token>"
        )


def _equal(given: str, token: SecretStr | None) -> bool:
    """Compare in constant time, so that the time of an answer tells nothing about the token."""
    return token is not None and hmac.compare_digest(
        given.encode("utf-8", "replace"), token.get_secret_value().encode()
    )
