"""Responses, and errors in the shape of their protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from service.errors import STATUS_BY_CODE, RequestError
from service.web.content_encoding import ACCEPTED


def graft_error(error: RequestError) -> dict[str, Any]:
    """The error body of Graft's own routes, `ErrorResponse`.

    A plain dictionary, because in a storm two of three answers are refusals.
    """
    return {"error": {"code": error.code, "message": error.message}}


def plain_error(error: RequestError) -> dict[str, Any]:
    """The error body of all other protocols, `ProtocolError`."""
    return {"error": error.message}


def json_response(
    body: BaseModel | Mapping[str, Any] | list[Any],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    content = body.model_dump_json() if isinstance(body, BaseModel) else json.dumps(body)
    return Response(content, status, headers, media_type="application/json")


def error_response(error: RequestError, body: Mapping[str, Any]) -> Response:
    """`body` with the status of `error` and the headers that HTTP asks for with it."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.allowed_methods:
        headers["Allow"] = ", ".join(error.allowed_methods)
    if error.code == "unsupported_encoding":
        headers["Accept-Encoding"] = ACCEPTED
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, STATUS_BY_CODE[error.code], headers)
