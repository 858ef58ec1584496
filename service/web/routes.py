"""The way in: finds the handler, checks the token, gives every request an id, a log line and its metrics, every error its shape."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import sys
import time
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.errors import STATUS_BY_CODE, RequestError
from service.inference.server import Server
from service.web.access_log import (
    _METRICS_ROUTE,
    _OTHER,
    _QUIET_ROUTES,
    _RECORD_SECONDS,
    _Answered,
    _log_line,
)
from service.web.auth import _check_token
from service.web.connection import keep_connection, send_whole
from service.web.linger import RequestBody
from service.web.responses import graft_error, json_response
from service.web.route import ErrorBody, Route, _takes

logger = logging.getLogger("bentoml.graft")

# What BentoML answers itself. Its start page is not among them: it loads a third party's script.
_BENTOML_PATHS = ("/healthz", "/schema.json")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# A loose pattern takes a time that grows with the square of the path's length.
_MAX_MEANT_CHARACTERS = 1000
_GATHER_SECONDS = 0.003


class Routes:
    """ASGI middleware that answers `routes` itself and hands BentoML its own paths."""

    def __init__(self, app: ASGIApp, server: Server, routes: Sequence[Route]) -> None:
        self._app = app
        self._server = server
        self._routes = routes
        # Nearly all requests go to a path without parts.
        self._plain = {route.path: route for route in routes if "{" not in route.path}
        self._answered: list[_Answered] = []
        self._recording: asyncio.TimerHandle | None = None
        self._is_gathering = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._come_first(scope["app"])
            await self._app(scope, receive, send)
            self._write_records()
            return
        if scope["type"] != "http" or scope["path"] in _BENTOML_PATHS:
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        body = RequestBody(scope, receive)
        request = Request(scope, body.receive)
        request.state.log = {}
        request_id = body.headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = b"%032x" % random.getrandbits(128)
        route = self._find(request)
        if route is not None and route.path == _METRICS_ROUTE:
            self._write_records()
        response = await self._answer(request, route)
        response.raw_headers.append((b"x-request-id", request_id))
        # Before it is sent: how long a refused client goes on sending is not this server's time.
        seconds = time.perf_counter() - start
        if body.must_linger:
            await response(
                scope, body.receive, body.linger(send, self._server.settings.body_seconds)
            )
        else:
            await send_whole(response, scope, body.receive, send)
        self._record(request, request_id.decode(), route, response, seconds)

    def _come_first(self, application: Starlette) -> None:
        """Take our own paths before BentoML's middlewares do, which would put each request into a task of its own and keep a timer of
        it for its whole timeout after it was answered: 18,000 of them at 400 requests a second. Theirs is left to them, and all where
        there are spans, which are made there.
        """
        settings = self._server.settings
        theirs = application.middleware_stack
        assert theirs is not None, "the lifespan comes through it"

        async def first(scope: Scope, receive: Receive, send: Send) -> None:
            is_http = scope["type"] == "http"
            if is_http:
                keep_connection(send, settings.keep_alive_seconds)
            is_ours = is_http and not settings.tracing and scope["path"] not in _BENTOML_PATHS
            await (self if is_ours else theirs)(scope, receive, send)

        application.middleware_stack = first

    def _find(self, request: Request) -> Route | None:
        path = request.scope["path"]
        if (route := self._plain.get(path)) is not None and _takes(route, request.method):
            return route
        for route in self._routes:
            if _takes(route, request.method) and (match := route.pattern.fullmatch(path)):
                request.scope["path_params"] = match.groupdict()
                return route
        return None

    async def _answer(self, request: Request, route: Route | None) -> Response:
        error_body = route.error_body if route is not None else self._error_body(request)
        try:
            if route is None:
                raise self._nothing_here(request)
            _check_token(request, route, self._server)
            return await route.handler(request, self._server)
        except RequestError as error:
            return self._refuse(request, error, error_body)
        except ClientDisconnect:
            # Nobody is there to read it; the status is for metrics and logs.
            return Response(status_code=499)
        # The last resort: the client learns nothing of the inside, the log everything.
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            internal = RequestError(
                "internal", "something went wrong inside the server; its log has the details"
            )
            return self._refuse(request, internal, error_body)

    def _error_body(self, request: Request) -> ErrorBody:
        """Where nothing is: the shape of what was meant, else of what else is below the same first name, if that is one."""
        path = request.scope["path"]
        meant = [
            route
            for route in self._routes
            if len(path) <= _MAX_MEANT_CHARACTERS and route.loose_pattern.fullmatch(path)
        ]
        if meant:
            return min(meant, key=lambda route: not _takes(route, request.method)).error_body
        bodies = {
            route.error_body
            for route in self._routes
            if route.path.split("/")[1] == path.split("/")[1]
        }
        return bodies.pop() if len(bodies) == 1 else graft_error

    def _nothing_here(self, request: Request) -> RequestError:
        path = request.scope["path"]
        if methods := sorted(
            {route.method for route in self._routes if route.pattern.fullmatch(path)}
        ):
            return RequestError(
                "method_not_allowed",
                f"{path[:200]} takes {' or '.join(methods)}, not {request.method[:20]}",
                allowed_methods=[*methods, *(["HEAD"] if "GET" in methods else [])],
            )
        return RequestError(
            "not_found",
            "there is nothing here; POST /predict takes images, /docs.json describes all the rest",
        )

    def _gather(self) -> None:
        """Let requests come together, as a network card does with its interrupts: in a storm one that follows another costs half of what
        it costs between two images, and 3 % more of them are answered. The engine has work for ten times as long."""
        self._is_gathering = False
        time.sleep(_GATHER_SECONDS)

    def _refuse(self, request: Request, error: RequestError, error_body: ErrorBody) -> Response:
        noted = request.scope["state"]["log"]
        noted["error"] = error.code
        for name, version in zip(
            noted.get("model") or [""], noted.get("version") or [""], strict=True
        ):
            metrics.note(metrics.REJECTED, (error.code, name, str(version)))
        if error.code == "overloaded" and not self._is_gathering:
            # Once in a turn of the event loop, however many are refused in it.
            self._is_gathering = True
            asyncio.get_running_loop().call_soon(self._gather)
        response = json_response(error_body(error), STATUS_BY_CODE[error.code])
        if error.retry_after_seconds is not None:
            response.raw_headers.append((b"retry-after", b"%d" % error.retry_after_seconds))
        if error.allowed_methods:
            response.raw_headers.append((b"allow", ", ".join(error.allowed_methods).encode()))
        if error.code == "unauthorized":
            response.raw_headers.append((b"www-authenticate", b"Bearer"))
        return response

    def _record(
        self,
        request: Request,
        request_id: str,
        route: Route | None,
        response: Response,
        seconds: float,
    ) -> None:
        name = route.path if route is not None else _OTHER
        metrics.note(metrics.REQUESTS, (name, str(response.status_code)))
        metrics.note(metrics.REQUEST_SECONDS, (name,), seconds)
        self._answered.append(
            _Answered(time.time(), request_id, request.scope, name, response.status_code, seconds)
        )
        if self._recording is None:
            self._recording = asyncio.get_running_loop().call_later(
                _RECORD_SECONDS, self._write_records
            )

    def _write_records(self) -> None:
        """Count and log what was answered since the last time."""
        if self._recording is not None:
            self._recording.cancel()
            self._recording = None
        answered, self._answered = self._answered, []
        metrics.write_noted()
        if self._server.settings.access_log:
            lines = [
                _log_line(one)
                for one in answered
                if one.route not in _QUIET_ROUTES or one.status >= 400
            ]
            # Past `logging`, whose machinery costs more than the lines; and all at once, for containers have Python's output unbuffered.
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
