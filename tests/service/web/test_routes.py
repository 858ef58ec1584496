"""Routing and errors of the real table: what a wrong path, method or token gets, in which shape."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.app import ROUTES
from service.inference.server import Server
from service.settings import Settings
from service.web.responses import plain_error
from service.web.route import Route
from service.web.routes import Routes

TOKEN = "a-token-for-tests"
ADMIN_TOKEN = "another-token-for-tests"
Ask = Callable[..., httpx.Response]


async def crash(request: Request, server: Server) -> Response:
    raise ValueError("a secret of the inside")


async def leave(request: Request, server: Server) -> Response:
    raise ClientDisconnect


EXTRA = (
    Route("GET", "/crash", crash),
    Route("GET", "/v2/crash", crash, error_body=plain_error),
    Route("GET", "/leave", leave),
)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Ask the table, with routes that fail, of a server that has no model and did not start."""
    return ask_with(Settings.model_validate({"CHECKPOINTS": tmp_path}))


def ask_with(settings: Settings, routes: Sequence[Route] = (*ROUTES, *EXTRA)) -> Ask:
    app = Starlette(middleware=[Middleware(Routes, server=Server(settings), routes=routes)])

    def ask(method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                response = await client.request(method, path, **options)
                await asyncio.sleep(0.1)  # the access log is written a moment later
                return response

        return asyncio.run(send())

    return ask


def test_every_path_of_the_table_has_one_route() -> None:
    """So that the router's 405 names every method of a path, and a route is found by its path."""
    assert max(Counter(route.path for route in ROUTES).values()) == 1


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/predict", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/colors/rollout", "PATCH"),
        ("GET", "/v1/models/colors/versions/1:load", "POST"),
        ("GET", "/v1/models/colors:predict", "POST"),
        ("POST", "/v1/models/colors/metadata", "GET, HEAD"),
        ("GET", "/v2/models/colors/infer", "POST"),
        ("POST", "/v2", "GET, HEAD"),
        ("GET", "/hf/colors", "POST"),
        ("PUT", "/livez", "GET, HEAD"),
    ],
)
def test_another_method_is_told_which_one_the_path_takes(
    ask: Ask, method: str, path: str, allow: str
) -> None:
    response = ask(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    (route,) = (one for one in ROUTES if matches(one, path))
    message = message_of(response, is_plain=route.error_body is plain_error)
    assert message == f"{path} takes {allow.removesuffix(', HEAD')}, not {method}"


@pytest.mark.parametrize(
    ("path", "is_plain"),
    [
        ("/models", False),
        ("/predict/", False),
        ("/predict/x", False),
        ("/v1", False),
        ("/v1/modelss", False),
        ("/v1/models/a/b/c/d", True),
        ("/v1/models/colors:", True),
        ("/v1/models/a:b:predict", True),
        ("/v1/models/colors/versions/1:lod", True),
        ("/v1/models/a:b/rollout", False),
        ("/v1/models/a/b/versions/1:load", False),
        ("/v1/models/a/versions/1:2:unload", False),
        ("/v2/", True),
        ("/v2/repository/index", True),
        ("/v2/models/colors/infer/x", True),
        ("/v22", False),
        ("/hf", True),
        ("/hf/a/b", True),
        ("/" + "x" * 5000, False),
    ],
)
def test_an_unknown_path_gets_a_way_out_in_the_shape_of_its_protocol(
    ask: Ask, path: str, is_plain: bool
) -> None:
    for method in ("GET", "POST"):
        response = ask(method, path)
        assert response.status_code == 404
        assert "/docs.json describes" in message_of(response, is_plain=is_plain)


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("/predict/", "/predict"),
        ("//predict", "/predict"),
        ("/predict//", "/predict"),
        ("/predict/?model=a", "/predict"),
        ("/v1/models/", "/v1/models"),
        ("/v1//models", "/v1/models"),
        ("/v1/models/colors/rollout/", "/v1/models/colors/rollout"),
        ("/v1/models/colors:predict/", "/v1/models/colors:predict"),
        ("/v1/models/colors/versions/1:load/", "/v1/models/colors/versions/1:load"),
        ("/v2/", "/v2"),
        ("/v2/models/colors/infer/", "/v2/models/colors/infer"),
        ("//v2/models/colors/ready", "/v2/models/colors/ready"),
        ("/hf/colors/", "/hf/colors"),
        ("//", "/"),
        ("/metrics/", "/metrics"),
    ],
)
def test_a_slash_too_many_is_named(ask: Ask, path: str, clean: str) -> None:
    """No redirect, in which clients lose the body of a POST."""
    (route,) = (one for one in ROUTES if matches(one, clean))
    for method in ("GET", "POST"):
        response = ask(method, f"http://test{path}")
        assert response.status_code == 404
        message = message_of(response, is_plain=route.error_body is plain_error)
        assert f"did you mean {clean}, without the extra slash? " in message


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/predict?modle=colors", ["'modle'", "/predict takes model, version, top_k"]),
        ("POST", "/predict?model=colors&topk=3", ["'topk'", "top_k"]),
        ("POST", "/predict?Model=colors", ["'Model'"]),
        ("POST", "/predict?images=a.jpg", ["'images'"]),
        ("POST", "/predict?=colors", ["''"]),
        ("POST", "/predict?model=a&model=b", ["'model' more than once"]),
        ("POST", "/predict?top_k=1&top_k=1", ["'top_k' more than once"]),
        ("POST", "/predict?%D0%BA=1", ["'к'"]),
        ("GET", "/v1/models?verbose", ["'verbose'", "/v1/models takes none"]),
        ("GET", "/v1/status?model=colors", ["'model'", "takes none"]),
        ("POST", f"/predict?{1000 * 'x'}", [f"'{100 * 'x'}'"]),
    ],
)
def test_an_unknown_query_parameter_is_named(
    ask: Ask, method: str, path: str, words: list[str]
) -> None:
    response = ask(method, path)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "bad_parameter"
    message = message_of(response, is_plain=False)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("suffix", ["/versions/1:load", "/versions/1:unload", "/rollout"])
def test_administration_takes_no_query(tmp_path: Path, suffix: str) -> None:
    tokens = {"admin_token": SecretStr(ADMIN_TOKEN)}
    ask = ask_with(Settings.model_validate({"CHECKPOINTS": tmp_path, **tokens}))
    response = ask(
        "PATCH" if suffix == "/rollout" else "POST",
        f"/v1/models/colors{suffix}?force=1",
        headers={"authorization": f"Bearer {ADMIN_TOKEN}"},
    )
    assert response.status_code == 400
    assert "'force'" in message_of(response, is_plain=False)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/?utm_source=a", 200),
        ("/livez?verbose", 200),
        ("/metrics?module=a", 200),
        ("/docs.json?v=1", 200),
        ("/v2?a=b", 200),
        ("/v1/models/colors?a=b", 503),
        ("/predict?", 405),
    ],
)
def test_a_query_that_is_not_looked_at(ask: Ask, path: str, status: int) -> None:
    """Browsers, probes and scrapers add their own; other protocols' clients may (tritonclient)."""
    assert ask("GET", path).status_code == status


@pytest.mark.parametrize(("path", "is_plain"), [("/crash", False), ("/v2/crash", True)])
def test_a_crash_tells_the_client_nothing_and_the_log_everything(
    ask: Ask, path: str, is_plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    response = ask("GET", path)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "its log has the details" in message_of(response, is_plain=is_plain)
    (record,) = (one for one in caplog.records if one.name == "bentoml.graft")
    assert record.exc_info is not None
    assert "a secret of the inside" in str(record.exc_info[1])


def test_a_client_that_left_is_counted_and_no_error(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask("GET", "/leave").status_code == 499
    assert not caplog.records


def test_every_answer_has_the_requests_id_or_a_new_one(ask: Ask) -> None:
    given = ask("GET", "/livez", headers={"x-request-id": "a.good:id-1"})
    assert given.headers["x-request-id"] == "a.good:id-1"
    for bad in ("", "a b", "x" * 129, "a\tb"):
        new = ask("GET", "/nothing", headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(new) == 32
        assert int(new, 16) >= 0


def test_a_line_for_each_request_but_health(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    ask("GET", "/livez")
    ask("GET", "/readyz")
    ask("GET", "/v1/models/colors", headers={"x-request-id": "the-id"})
    health, line = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    # Not ready is worth a line.
    assert (health["path"], health["status"]) == ("/readyz", 503)
    assert line["id"] == "the-id"
    assert (line["method"], line["path"]) == ("GET", "/v1/models/colors")
    assert (line["status"], line["error"]) == (503, "not_ready")
    assert line["ms"] >= 0


def test_an_access_log_that_is_switched_off_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ask_with(Settings.model_validate({"CHECKPOINTS": tmp_path, "access_log": False}))
    ask("GET", "/nothing")
    assert capsys.readouterr().out == ""


def test_requests_are_counted_by_route_and_not_by_path(ask: Ask) -> None:
    for path in ("/v1/models/a/metadata", "/v1/models/b/metadata", "/nothing", "/nowhere"):
        ask("GET", path)
    text = ask("GET", "/metrics").text
    pattern = "/v1/models/{name}/metadata"
    assert f'graft_requests_total{{route="{pattern}",status="503"}}' in text
    assert 'graft_requests_total{route="other",status="404"}' in text
    assert "/v1/models/a/" not in text
    assert "/nothing" not in text


@pytest.mark.parametrize(
    ("authorization", "path", "status"),
    [
        (None, "/livez", 200),
        (None, "/v1/models", 401),
        ("Bearer", "/v1/models", 401),
        ("Bearer wrong", "/v1/models", 401),
        (f"Basic {TOKEN}", "/v1/models", 401),
        (f"Bearer {TOKEN}", "/v1/models", 503),
        (f"bearer  {TOKEN} ", "/v1/models", 503),
        (f"Bearer {ADMIN_TOKEN}", "/v1/models", 503),
        (f"Bearer {TOKEN}", "/v1/models/a/versions/x:load", 401),
        (f"Bearer {ADMIN_TOKEN}", "/v1/models/a/versions/x:load", 400),
    ],
)
def test_tokens(tmp_path: Path, authorization: str | None, path: str, status: int) -> None:
    tokens = {"api_token": SecretStr(TOKEN), "admin_token": SecretStr(ADMIN_TOKEN)}
    ask = ask_with(Settings.model_validate({"CHECKPOINTS": tmp_path, **tokens}))
    headers = {} if authorization is None else {"authorization": authorization}
    response = ask("POST" if path.endswith(":load") else "GET", path, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


def test_without_tokens_predictions_are_open_and_administration_is_off(ask: Ask) -> None:
    assert ask("GET", "/v1/models").status_code == 503
    response = ask("POST", "/v1/models/a/versions/1:load")
    assert response.status_code == 403
    assert "GRAFT_ADMIN_TOKEN" in message_of(response, is_plain=False)


def message_of(response: httpx.Response, *, is_plain: bool) -> str:
    error = response.json()["error"]
    assert isinstance(error, str) == is_plain, response.text
    message = error if is_plain else error["message"]
    assert isinstance(message, str)
    return message


def matches(route: Route, path: str) -> bool:
    """Whether the path has the parts of the route, one by one."""
    verb = route.path.partition(":")[2]
    own, _, own_verb = path.partition(":")
    parts, own_parts = route.path.partition(":")[0].split("/"), own.split("/")
    return (verb, len(parts)) == (own_verb, len(own_parts)) and all(
        part in (own_part, "{name}", "{version}", "{label}")
        for part, own_part in zip(parts, own_parts, strict=True)
    )
