"""Load, unload and roll out versions of the repository while it is served.

These routes need GRAFT_ADMIN_TOKEN. They take names and numbers only: no path, no URL.

    curl -X PATCH -H "Authorization: Bearer $TOKEN" localhost:3000/v1/models/digits/rollout \
        -d '{"default": "stable", "labels": {"stable": 3}, "canary": {"version": 4, "share": 0.05}}'
"""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.rollout import Rollout
from service.inference.server import Server
from service.protocols.schemas import RolloutResponse
from service.web.numbers import parse_whole_number
from service.web.responses import json_response
from service.web.uploads import read_body


async def load_version(request: Request, server: Server) -> Response:
    """`POST /v1/models/NAME/versions/V:load`: serve a version, and as `latest` if newest."""
    version = _version(request)
    return await _change(
        request,
        server,
        lambda rollout: rollout.patched(
            {
                "loaded": sorted(rollout.loaded | {version}),
                "unloaded": sorted(rollout.unloaded - {version}),
            },
        ),
    )


async def unload_version(request: Request, server: Server) -> Response:
    """`POST /v1/models/NAME/versions/V:unload`: stop serving a version."""
    version = _version(request)
    return await _change(
        request,
        server,
        lambda rollout: rollout.patched(
            {
                "loaded": sorted(rollout.loaded - {version}),
                "unloaded": sorted(rollout.unloaded | {version}),
            },
        ),
    )


async def patch_rollout(request: Request, server: Server) -> Response:
    """`PATCH /v1/models/NAME/rollout`: a JSON merge patch of default, labels, canary and shadow."""
    with server.memory_budget.reserve() as reservation:
        body = await read_body(request, server.settings, reservation)
    try:
        patch = json.loads(body)
    except (ValueError, RecursionError):
        patch = None
    if not isinstance(patch, dict):
        raise RequestError(
            "bad_request",
            'the body is not a JSON object such as {"default": "stable", "labels": {"stable": 3}}',
        )
    return await _change(request, server, lambda rollout: rollout.patched(patch))


async def _change(
    request: Request, server: Server, change: Callable[[Rollout], Rollout]
) -> Response:
    name = request.path_params["name"]
    persisted = await server.repository.change_rollout(name, change)
    served = server.repository.current.models.get(name)
    rollout = served.rollout if served is not None else Rollout()
    versions = sorted(served.versions) if served is not None else []
    return json_response(
        RolloutResponse(model=name, rollout=rollout, versions=versions, persisted=persisted)
    )


def _version(request: Request) -> int:
    text = request.path_params["version"]
    number = parse_whole_number(text, 10**9 - 1)
    if not number:
        raise RequestError(
            "bad_parameter", f"{text[:20]!r} is not a version: they are whole numbers from 1 up"
        )
    return number
