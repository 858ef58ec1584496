"""ASGI middleware: routing, authentication, request ids, access log, metrics, error formats."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Sequence
from copy import copy

from starlette import routing
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.errors import RequestError
from service.inference.server import Server
from service.web.access_log import AccessLog, Answered
from service.web.auth import check_token
from service.web.linger import RequestBody
from service.web.responses import error_response, graft_error, plain_error
from service.web.route import ErrorBody, Route

logger = logging.getLogger("bentoml.graft")

# What BentoML answers itself. Its start page is not among them: it loads a third party's script.
_BENTOML_PATHS = ("/healthz", "/schema.json")
# Below these an unknown path gets its error in the shape of the other protocols, but where it ends
# as one of Graft's own routes does.
_PROTOCOL_PATHS = ("/v1/models/", "/v2/", "/hf/")
_UNKNOWN_ROUTE = "other"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CLIENT_LEFT_STATUS = 499


class _NameConvertor(StringConvertor):
    """A `{name}` part: without the `:` that precedes a verb, as in `/v1/models/NAME:predict`."""

    regex = "[^/:]+"


register_url_convertor("name", _NameConvertor())


class Routes:
    """ASGI middleware that answers `routes`, and hands BentoML its own paths."""

    def __init__(self, app: ASGIApp, server: Server, routes: Sequence[Route]) -> None:
        self._bentoml = app
        self._body_seconds = server.settings.body_seconds
        self._access_log = AccessLog(is_printed=server.settings.access_log)
        self._error_bodies = {route.path: route.error_body for route in routes}
        # `/rollout`, `:load` …: what Graft's own routes have after a name.
        self._own_endings = tuple(
            route.path.rpartition("}")[2]
            for route in routes
            if route.parameters and route.error_body is graft_error
        )
        self._router = build_router(routes, server)
        self._methods = sorted({"HEAD", *(route.method for route in routes)})
        self._answer: ASGIApp = ExceptionMiddleware(
            self._router,
            handlers={
                RequestError: self._on_request_error,
                HTTPException: self._on_http_error,
                ClientDisconnect: _on_disconnect,
                Exception: self._on_crash,
            },
        )
        if isinstance(app, CORSMiddleware):
            # BentoML's, as its setting http.cors says. It stands below this middleware, so that
            # alone it would reach nothing but BentoML's own paths.
            cors = copy(app)
            cors.app = self._answer
            self._answer = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _BENTOML_PATHS:
            await self._bentoml(scope, receive, send)
            if scope["type"] == "lifespan":
                self._access_log.write()
            return
        start = time.perf_counter()
        body = RequestBody(scope, receive)
        request_id = _find_request_id(body.headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["log"] = {}
        send_end = body.linger(send, self._body_seconds)
        status, seconds = 0, 0.0

        async def send_answer(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                # Before it is sent: how long a client reads or goes on sending is its own time.
                status, seconds = message["status"], time.perf_counter() - start
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send_end(message)

        await self._answer(scope, body.receive, send_answer)
        self._access_log.add(
            Answered(time.time(), request_id.decode(), scope, _route_path(scope), status, seconds)
        )

    async def _on_request_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        noted = request.state.log
        noted["error"] = error.code
        for name, version in zip(
            noted.get("model") or [""], noted.get("version") or [""], strict=True
        ):
            metrics.note(metrics.REJECTED, (error.code, name, str(version)))
        return error_response(error, self._error_body(request.scope)(error))

    async def _on_http_error(self, request: Request, error: Exception) -> Response:
        """Starlette's own: no such path, or a path without this method."""
        assert isinstance(error, HTTPException)
        if request.method == "OPTIONS" and request.scope["path"] == "*":
            # It asks about the server as a whole (RFC 9110, 9.3.7).
            return Response(status_code=204, headers={"Allow": ", ".join(self._methods)})
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        return await self._on_request_error(
            request,
            self._no_route(request) if error.status_code == 404 else _no_method(request, allowed),
        )

    def _no_route(self, request: Request) -> RequestError:
        # Not redirected: clients repeat a redirected POST as a GET, or without its body.
        clean = "/" + "/".join(part for part in request.scope["path"].split("/") if part)
        asked = {**request.scope, "path": clean}
        way_out = "POST /predict takes images,"
        for route in self._router.routes:
            if route.matches(asked)[0] is not routing.Match.NONE:
                # The error has the shape of this route's, and is counted as its.
                request.scope["route"] = route
                way_out = f"did you mean {clean[:200]}, without the extra slash?"
        return RequestError(
            "not_found", f"there is nothing here; {way_out} /docs.json describes all the rest"
        )

    async def _on_crash(self, request: Request, error: Exception) -> Response:
        """The client learns nothing of the inside; the log has all of it."""
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        internal = RequestError(
            "internal", "something went wrong inside the server; its log has the details"
        )
        return await self._on_request_error(request, internal)

    def _error_body(self, scope: Scope) -> ErrorBody:
        """The shape of the route that was found, else the shape of the routes that look like it."""
        if (path := _route_path(scope)) in self._error_bodies:
            return self._error_bodies[path]
        path = scope["path"]
        is_protocols = f"{path}/".startswith(_PROTOCOL_PATHS)
        return plain_error if is_protocols and not path.endswith(self._own_endings) else graft_error


def build_router(routes: Sequence[Route], server: Server) -> routing.Router:
    """Starlette's router, whose routes are named by their paths."""
    return routing.Router([_build_route(one, server) for one in routes], redirect_slashes=False)


def _build_route(route: Route, server: Server) -> routing.Route:
    async def answer(request: Request) -> Response:
        check_token(
            request.headers.get("authorization", ""),
            route.needs,
            api_token=server.settings.api_token,
            admin_token=server.settings.admin_token,
        )
        if route.query is not None and request.scope["query_string"]:
            _check_query(request.query_params, route.query, request.scope["path"])
        return await route.handler(request, server)

    path = route.path.replace("}", ":name}")
    return routing.Route(path, answer, methods=[route.method], name=route.path)


def _check_query(query: QueryParams, allowed: Sequence[str], path: str) -> None:
    """Raises RequestError for a parameter that the route does not have, or that is there twice."""
    seen = set()
    for name, _ in query.multi_items():
        if name not in allowed:
            raise RequestError(
                "bad_parameter",
                f"the query has a parameter {name[:100]!r}; {path[:200]} takes "
                + (", ".join(allowed) or "none"),
            )
        if name in seen:
            raise RequestError(
                "bad_parameter", f"the query has {name!r} more than once; send it once"
            )
        seen.add(name)


def _route_path(scope: Scope) -> str:
    """The path of the route that was found, also where it does not take the method."""
    route = scope.get("route")
    return route.name if isinstance(route, routing.Route) else _UNKNOWN_ROUTE


def _find_request_id(given: bytes) -> bytes:
    return given if _REQUEST_ID.fullmatch(given) else b"%032x" % random.getrandbits(128)


def _no_method(request: Request, allowed: Sequence[str]) -> RequestError:
    taken = " or ".join(method for method in allowed if method != "HEAD")
    return RequestError(
        "method_not_allowed",
        f"{request.scope['path'][:200]} takes {taken}, not {request.method[:20]}",
        allowed_methods=allowed,
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody is there to read it; the status is for metrics and logs."""
    return Response(status_code=_CLIENT_LEFT_STATUS)
