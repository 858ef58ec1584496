"""Hugging Face's image classification API on the real server.

Their own client, raw bytes, JSON, and bad requests.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RunPython
from tests.support.images import draw_image
from tests.support.servers import RunningServer, copy_checkpoint, serve

MAX_BODY_BYTES = 500_000
CLIENT = """
import json, sys
from huggingface_hub import InferenceClient
model, path, top_k = sys.argv[1:]
labels = InferenceClient().image_classification(path, model=model, top_k=int(top_k) or None)
print(json.dumps([[one.label, one.score] for one in labels]))
"""


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("hugging_face")
    copy_checkpoint(colors, folder / "checkpoints", "colors", 1)
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "GRAFT_MAX_PIXELS": "1000000",
    }
    with serve(folder / "log", env) as running:
        yield running


def predicted(client: httpx.Client, image: bytes) -> list[dict[str, Any]]:
    """What /predict says, best first."""
    body = client.post("/predict", content=image, headers={"content-type": "image/jpeg"}).json()
    top: list[dict[str, Any]] = body["predictions"][0]["top"]
    return top


def check_error(response: httpx.Response, status: int, *words: str) -> None:
    """The protocol's error, with these words in its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in response.json()["error"]


@pytest.mark.parametrize("top_k", [0, 2])
def test_hugging_faces_client(
    server: RunningServer, client: httpx.Client, run_python: RunPython, tmp_path: Path, top_k: int
) -> None:
    """As raw bytes without top_k, as JSON with it."""
    image = draw_image("green", seed=3)
    (tmp_path / "x.jpg").write_bytes(image)
    # Their offline mode forbids the loopback too.
    finished = run_python(
        CLIENT, f"{server.url}/hf/colors", str(tmp_path / "x.jpg"), str(top_k), HF_HUB_OFFLINE="0"
    )
    assert finished.returncode == 0, finished.stderr
    labels = json.loads(finished.stdout)
    wanted = predicted(client, image)[: top_k or 3]
    assert [label for label, _ in labels] == [one["label"] for one in wanted]
    assert [score for _, score in labels] == pytest.approx(
        [one["score"] for one in wanted], abs=1e-6
    )


@pytest.mark.parametrize(
    "content_type",
    [
        "image/jpeg",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "text/plain",
        None,
    ],
)
def test_raw_bytes_whatever_the_content_type(
    client: httpx.Client, content_type: str | None
) -> None:
    image = draw_image("blue")
    response = client.post(
        "/hf/colors", content=image, headers={"content-type": content_type} if content_type else {}
    )
    assert response.json() == predicted(client, image)


@pytest.mark.parametrize(
    ("parameters", "num_labels"),
    [
        ({}, 3),
        ({"parameters": None}, 3),
        ({"parameters": {}}, 3),
        ({"parameters": {"top_k": None}}, 3),
        ({"parameters": {"top_k": 1}}, 1),
        ({"parameters": {"top_k": 100, "function_to_apply": "softmax"}}, 3),
        ({"options": {"wait_for_model": True}}, 3),
    ],
)
def test_json(client: httpx.Client, parameters: dict[str, Any], num_labels: int) -> None:
    image = draw_image("red")
    response = client.post(
        "/hf/colors", json={"inputs": base64.b64encode(image).decode(), **parameters}
    )
    assert response.json() == predicted(client, image)[:num_labels]


def test_versions(client: httpx.Client) -> None:
    for version in ("1", "latest"):
        assert (
            client.post(f"/hf/colors/versions/{version}", content=draw_image("red")).json()[0][
                "label"
            ]
            == "red"
        )
    check_error(client.post("/hf/colors/versions/2", content=draw_image("red")), 404, "'2'")
    check_error(client.post("/hf/cats", content=draw_image("red")), 404, "'cats'", "colors")
    check_error(client.post("/hf/all", content=draw_image("red")), 404, "'all'")
    check_error(client.get("/hf/colors"), 405, "POST")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, ["empty"]),
        (b"x", 400, ["not an image"]),
        (b"[]", 400, ["not an image"]),
        (b"http://127.0.0.1/x.jpg", 400, ["not an image"]),
        (draw_image("red")[:300], 400, ["the image:"]),
        (draw_image("red", size=(1200, 1000)), 413, ["1200x1000"]),
        (b"x" * (MAX_BODY_BYTES + 1), 413, ["GRAFT_MAX_BODY_BYTES"]),
        (b"{", 400, ["not JSON"]),
        (b"{}", 400, ["inputs", "required"]),
        (b'{"inputs": 7}', 400, ["inputs"]),
        (b'{"inputs": ["Zm9v"]}', 400, ["inputs"]),
        (b'{"inputs": ""}', 400, ["empty"]),
        (b'{"inputs": "Zm9v"}', 400, ["not an image"]),
        (b'{"inputs": "http://127.0.0.1/x.jpg"}', 400, ["not base64", "not fetched"]),
        (b'{"inputs": "data:image/jpeg;base64,Zm9v"}', 400, ["not an image"]),
        (b'{"inputs": "data:image/jpeg,Zm9v"}', 400, ["inputs is a data: URL", ";base64,"]),
        (b' {"inputs": "", "parameters": {"top_k": 0}}', 400, ["parameters.top_k", "1"]),
        (b'{"inputs": "", "parameters": {"top_k": "3"}}', 400, ["parameters.top_k", "integer"]),
        (b'{"inputs": "", "parameters": {"top_k": 1.5}}', 400, ["parameters.top_k"]),
        (
            b'{"inputs": "", "parameters": {"top_k": 1' + b"0" * 99 + b"}}",
            400,
            ["parameters.top_k"],
        ),
        (
            b'{"inputs": "", "parameters": {"function_to_apply": "sigmoid"}}',
            400,
            ["function_to_apply", "'softmax'"],
        ),
        (b'{"inputs": "", "parameters": {"topk": 3}}', 400, ["parameters.topk"]),
        (b'{"inputs": "", "parameters": []}', 400, ["parameters"]),
        (b'{"inputs": NaN}', 400, ["NaN"]),
        (b'{"a":' * 90_000, 413, ["values"]),
    ],
)
def test_a_bad_body(client: httpx.Client, body: bytes, status: int, words: list[str]) -> None:
    check_error(client.post("/hf/colors", content=body), status, *words)


def test_a_compressed_body(client: httpx.Client) -> None:
    headers = {"content-encoding": "gzip"}
    check_error(client.post("/hf/colors", content=b"x", headers=headers), 400, "gzip")
    response = client.post("/hf/colors", content=gzip.compress(draw_image("red")), headers=headers)
    assert response.json()[0]["label"] == "red"


def test_the_server_never_failed(client: httpx.Client, server: RunningServer) -> None:
    assert client.get("/readyz").status_code == 200
    assert "Traceback" not in server.log()
