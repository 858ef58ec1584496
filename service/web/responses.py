"""Responses, in the shape of their protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from service.errors import RequestError


def graft_error(error: RequestError) -> dict[str, Any]:
    """The one shape of our own routes, `ErrorResponse`: written out, for in a storm two of three answers are refusals."""
    return {"error": {"code": error.code, "message": error.message}}


def plain_error(error: RequestError) -> dict[str, Any]:
    """The shape of TF-Serving, the Open Inference Protocol and Hugging Face, `ProtocolError`."""
    return {"error": error.message}


def json_response(body: BaseModel | Mapping[str, Any] | list[Any], status: int = 200) -> Response:
    content = body.model_dump_json() if isinstance(body, BaseModel) else json.dumps(body)
    return Response(content, status, media_type="application/json")
