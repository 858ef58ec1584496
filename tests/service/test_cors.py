"""BentoML's setting `http.cors` holds on every route, and on every refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.images import draw_image
from tests.support.servers import RunningServer, copy_checkpoint, serve

PAGE = "http://a.example"
TOKEN = "a-token-for-tests"
MAX_BODY_BYTES, MAX_BUFFERED_BYTES = 200_000, 100_000


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    copy_checkpoint(colors, folder / "checkpoints", "colors", 1)
    cors = {
        "enabled": True,
        "access_control_allow_origins": [PAGE],
        "access_control_allow_methods": ["GET", "POST"],
        "access_control_allow_headers": ["Authorization"],
        "access_control_expose_headers": ["X-Request-ID"],
        "access_control_max_age": 60,
    }
    # JSON is YAML.
    config = {"services": {"Graft": {"http": {"cors": cors}}}}
    (folder / "bentoml.yaml").write_text(json.dumps(config))
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "BENTOML_CONFIG": str(folder / "bentoml.yaml"),
        "GRAFT_API_TOKEN": TOKEN,
        "GRAFT_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "GRAFT_MAX_BUFFERED_BYTES": str(MAX_BUFFERED_BYTES),
    }
    with serve(folder / "log", env) as running:
        yield running


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/predict",
        "/v1/models",
        "/v1/status",
        "/docs.json",
        "/livez",
        "/metrics",
        "/healthz",
        "/v1/models/colors:predict",
        "/v1/models/colors/metadata",
        "/v2/models/colors/infer",
        "/hf/colors",
        "/nothing",
    ],
)
def test_a_preflight_is_answered_without_a_token(client: httpx.Client, path: str) -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = client.options(path, headers=asked)
    assert response.status_code == 200
    assert response.headers.get_list("access-control-allow-origin") == [PAGE]
    assert response.headers["access-control-allow-methods"] == "GET, POST"
    assert "Authorization" in response.headers["access-control-allow-headers"]
    assert response.headers["access-control-max-age"] == "60"


IMAGE = draw_image("red")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/predict", IMAGE, 200),
        ("/predict", b"no image", 400),
        ("/predict?modle=a", IMAGE, 400),
        ("/predict?model=other", IMAGE, 404),
        ("/predict/", IMAGE, 404),
        ("/livez", IMAGE, 405),
        ("/predict", bytes(MAX_BODY_BYTES + 1), 413),
        ("/predict", bytes(MAX_BUFFERED_BYTES + 1), 429),
        ("/hf/colors", IMAGE, 200),
        ("/hf/colors", b"no image", 400),
        ("/v2/models/colors/infer", b"{}", 400),
        ("/v1/models/colors:predict", b"{}", 400),
    ],
)
def test_every_answer_may_be_read_by_the_page(
    client: httpx.Client, path: str, body: bytes, status: int
) -> None:
    headers = {
        "origin": PAGE,
        "authorization": f"Bearer {TOKEN}",
        "content-type": "application/octet-stream",
    }
    response = client.post(path, content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers.get_list("access-control-allow-origin") == [PAGE]
    assert response.headers["access-control-expose-headers"] == "X-Request-ID"
    assert response.headers["vary"] == "Origin"


def test_a_refused_token_may_be_read_by_the_page(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"origin": PAGE})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == PAGE


def test_a_server_without_a_model_may_be_read_by_the_page(
    server: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    env = {
        "CHECKPOINTS": str(tmp_path / "checkpoints"),
        "BENTOML_CONFIG": str(server.log_path.with_name("bentoml.yaml")),
    }
    with serve(tmp_path / "log", env, until="/livez") as empty:
        response = httpx.post(f"{empty.url}/predict", headers={"origin": PAGE})
    assert response.status_code == 503
    assert response.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("path", ["/predict", "/healthz"])
def test_other_pages_are_refused(client: httpx.Client, path: str) -> None:
    asked = {"origin": "http://b.example", "access-control-request-method": "POST"}
    response = client.options(path, headers=asked)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    asked = {"origin": "http://b.example", "authorization": f"Bearer {TOKEN}"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=asked).headers


def test_preflights_are_logged_and_have_an_id(client: httpx.Client, server: RunningServer) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "x-request-id": "preflight"}
    assert client.options("/predict", headers=asked).headers["x-request-id"] == "preflight"
