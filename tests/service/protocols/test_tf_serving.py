"""TensorFlow Serving's REST API on the real server.

Every form of a request that its documentation allows, and bad requests.
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

from models.checkpoint import WEIGHTS_FILE
from tests.support.images import draw_image
from tests.support.servers import LABELS, RunningServer, change_file, copy_checkpoint, serve

MAX_IMAGES = 4
MAX_BODY_BYTES = 500_000


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Versions 1 and 2 of one model, of which 1 is stable, and a corrupted version 3."""
    folder = tmp_path_factory.mktemp("tf_serving")
    for version in (1, 2):
        copy_checkpoint(colors, folder / "checkpoints", "colors", version)
    corrupted = copy_checkpoint(colors, folder / "checkpoints", "colors", 3)
    change_file(
        corrupted / WEIGHTS_FILE, lambda data: data[:-1] + bytes([data[-1] ^ 1]), rehash=False
    )
    (folder / "checkpoints" / "colors" / "rollout.json").write_text('{"labels": {"stable": 1}}')
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_MAX_IMAGES": str(MAX_IMAGES),
        "GRAFT_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "GRAFT_MAX_PIXELS": "1000000",
    }
    with serve(folder / "log", env) as running:
        yield running


def b64(image: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(image).decode()}


def predict(client: httpx.Client, body: object, path: str = "/v1/models/colors:predict") -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def check_error(response: httpx.Response, status: int, *words: str) -> None:
    """The protocol's error, with these words in its message."""
    assert response.status_code == status, response.text
    (message,) = response.json().values()
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in message


def test_rows_have_the_scores_of_predict(client: httpx.Client) -> None:
    images = [draw_image(label, seed=7) for label in ("blue", "red")]
    ours = client.post("/predict", files=[("images", ("x.jpg", image)) for image in images]).json()[
        "predictions"
    ]
    rows = predict(
        client, {"signature_name": "serving_default", "instances": [b64(image) for image in images]}
    )["predictions"]
    assert [row["label"] for row in rows] == ["blue", "red"]
    for row, our in zip(rows, ours, strict=True):
        assert (row["label"], row["classes"]) == (our["label"], LABELS)
        assert row["score"] == pytest.approx(our["score"], abs=1e-6)
        scores = dict(zip(row["classes"], row["scores"], strict=True))
        assert scores == pytest.approx({one["label"]: one["score"] for one in our["top"]}, abs=1e-6)


def test_every_form_of_the_one_input(client: httpx.Client) -> None:
    image = b64(draw_image("green"))
    (row,) = predict(client, {"instances": [image]})["predictions"]
    assert predict(client, {"instances": [{"image_bytes": image}]})["predictions"] == [row]
    columns = {name: [value] for name, value in row.items()}
    for inputs in (image, [image], {"image_bytes": image}, {"image_bytes": [image]}):
        assert predict(client, {"inputs": inputs})["outputs"] == columns


def test_base64_with_wrapped_lines(client: httpx.Client) -> None:
    wrapped = base64.encodebytes(draw_image("green")).decode()
    assert predict(client, {"instances": [{"b64": wrapped}]})["predictions"][0]["label"] == "green"


@pytest.mark.parametrize(
    "path", ["", "/versions/1", "/versions/2", "/labels/stable", "/labels/latest"]
)
def test_every_path_of_a_version(client: httpx.Client, path: str) -> None:
    body = {"instances": [b64(draw_image("red"))]}
    assert (
        predict(client, body, f"/v1/models/colors{path}:predict")["predictions"][0]["label"]
        == "red"
    )


def test_the_status_of_the_versions(client: httpx.Client) -> None:
    def states(path: str) -> dict[str, str]:
        return {
            one["version"]: one["state"] for one in client.get(path).json()["model_version_status"]
        }

    assert states("/v1/models/colors") == {"3": "END", "2": "AVAILABLE", "1": "AVAILABLE"}
    assert states("/v1/models/colors/versions/1") == {"1": "AVAILABLE"}
    assert states("/v1/models/colors/labels/stable") == {"1": "AVAILABLE"}
    (refused,) = client.get("/v1/models/colors/versions/3").json()["model_version_status"]
    assert WEIGHTS_FILE in refused["status"]["error_message"]
    (served,) = client.get("/v1/models/colors/versions/2").json()["model_version_status"]
    assert served["status"] == {"error_code": "OK", "error_message": ""}
    check_error(client.get("/v1/models/cats"), 404, "'cats'", "colors")
    check_error(client.get("/v1/models/colors/versions/9"), 404, "'9'")


def test_the_signature(client: httpx.Client) -> None:
    for path, version in (("", "2"), ("/versions/1", "1"), ("/labels/stable", "1")):
        body = client.get(f"/v1/models/colors{path}/metadata").json()
        assert body["model_spec"] == {"name": "colors", "signature_name": "", "version": version}
        signature = body["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
        assert [size["size"] for size in signature["outputs"]["scores"]["tensor_shape"]["dim"]] == [
            "-1",
            "3",
        ]


def test_one_unreadable_image_fails_the_request_and_is_named(client: httpx.Client) -> None:
    good = b64(draw_image("red"))
    path = "/v1/models/colors:predict"
    check_error(
        client.post(path, json={"instances": [good, b64(b"no image")]}), 400, "instances[1]"
    )
    check_error(
        client.post(path, json={"inputs": [good, good, b64(good["b64"][:100].encode())]}),
        400,
        "inputs[2]",
    )
    check_error(
        client.post(path, json={"instances": [b64(draw_image("red", size=(1200, 1000)))]}),
        413,
        "instances[0]",
        "1200x1000",
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["not JSON"]),
        (b"\xff\xd8\xff", ["not JSON"]),
        (b"[]", ["the body", "instances"]),
        (b"null", ["the body"]),
        (b"{}", ["either 'instances'"]),
        (b'{"instances": null}', ["either 'instances'"]),
        (b'{"instances": [{"b64": ""}], "inputs": [{"b64": ""}]}', ["either 'instances'"]),
        (b'{"instances": []}', ["no image"]),
        (b'{"inputs": []}', ["no image"]),
        (b'{"instances": {"b64": ""}}', ["instances", "list"]),
        (b'{"instances": ["Zm9v"]}', ["instances.0", "b64"]),
        (b'{"instances": [[0.1, 0.2]]}', ["instances.0"]),
        (b'{"instances": [{"b64": 7}]}', ["instances.0.b64"]),
        (b'{"instances": [{"b64": null}]}', ["instances.0.b64"]),
        (b'{"instances": [{"image": {"b64": ""}}]}', ["instances.0.b64", "required"]),
        (b'{"instances": [{"b64": "", "url": "http://127.0.0.1/x.jpg"}]}', ["instances.0.url"]),
        (b'{"instances": [{"image_bytes": {"image_bytes": {"b64": ""}}}]}', ["instances.0"]),
        (b'{"inputs": {"image_bytes": [{"b64": ""}, "x"]}}', ["inputs.1"]),
        (b'{"inputs": "http://127.0.0.1/x.jpg"}', ["inputs.0"]),
        (
            b'{"instances": [{"b64": "http://127.0.0.1/x.jpg"}]}',
            ["instances[0]", "not base64", "not fetched"],
        ),
        (b'{"instances": [{"b64": "Zm9vY"}]}', ["instances[0]", "not base64", "multiple of 4"]),
        (b'{"instances": [{"b64": "\\u00e9\\ud800"}]}', ["instances[0]"]),
        (b'{"instances": [{"b64": ""}]}', ["instances[0]", "empty"]),
        (
            b'{"signature_name": "other", "instances": [{"b64": ""}]}',
            ["signature_name", "serving_default"],
        ),
        (b'{"instances": NaN}', ["not JSON", "NaN"]),
        (b'{"instances": 1' + b"0" * 5000 + b"}", ["not JSON"]),
        (b'{"instances": [{"b64": "Zm9v"}', ["not JSON"]),
        (b"[" * 50 + b"]" * 50, ["the body"]),
    ],
)
def test_a_bad_body(client: httpx.Client, body: bytes, words: list[str]) -> None:
    check_error(client.post("/v1/models/colors:predict", content=body), 400, *words)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"instances": [' + b"{}," * 100_000 + b"{}]}",
        b'{"instances": [' + b"1," * 200_000 + b"1]}",
    ],
    ids=["deep lists", "deep objects", "many objects", "many numbers"],
)
def test_json_with_too_many_keys_is_refused_before_it_is_parsed(
    client: httpx.Client, body: bytes
) -> None:
    check_error(client.post("/v1/models/colors:predict", content=body), 413, "values")


def test_the_limits(client: httpx.Client) -> None:
    image = b64(draw_image("red", size=(32, 32)))
    assert len(predict(client, {"instances": [image] * MAX_IMAGES})["predictions"]) == MAX_IMAGES
    path = "/v1/models/colors:predict"
    for body in (
        {"instances": [image] * (MAX_IMAGES + 1)},
        {"inputs": {"image_bytes": [image] * (MAX_IMAGES + 1)}},
    ):
        check_error(client.post(path, json=body), 413, "GRAFT_MAX_IMAGES")
    check_error(client.post(path, content=b" " * (MAX_BODY_BYTES + 1)), 413, "GRAFT_MAX_BODY_BYTES")


def test_a_compressed_body(client: httpx.Client) -> None:
    path, headers = "/v1/models/colors:predict", {"content-encoding": "gzip"}
    body = gzip.compress(json.dumps({"instances": [b64(draw_image("green"))]}).encode())
    response = client.post(path, content=body, headers=headers)
    assert response.json()["predictions"][0]["label"] == "green"
    check_error(client.post(path, content=b"{}", headers=headers), 400, "gzip")
    check_error(client.post(path, content=body), 415, "no header says so")
    bomb = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
    check_error(client.post(path, content=bomb, headers=headers), 413, "decompressed")
    response = client.post(path, content=body, headers={"content-encoding": "br"})
    check_error(response, 415, "'br'")
    assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models/cats:predict", 404),
        ("/v1/models/all:predict", 404),
        ("/v1/models/colors/versions/9:predict", 404),
        ("/v1/models/colors/versions/3:predict", 404),
        ("/v1/models/colors/versions/99999999999999999999:predict", 400),
        ("/v1/models/colors/versions/stable:predict", 400),
        ("/v1/models/colors/versions/-1:predict", 400),
        ("/v1/models/colors/labels/1:predict", 400),
        ("/v1/models/colors/labels/canary:predict", 404),
        ("/v1/models/%00:predict", 404),
    ],
)
def test_a_path_of_no_model(client: httpx.Client, path: str, status: int) -> None:
    check_error(client.post(path, json={"instances": [b64(draw_image("red"))]}), status)


def test_the_documentations_curl(server: RunningServer) -> None:
    """`curl -d` sends the content type of a form."""
    response = httpx.post(
        f"{server.url}/v1/models/colors:predict",
        content=json.dumps({"instances": [b64(draw_image("blue"))]}),
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.json()["predictions"][0]["label"] == "blue"


def test_the_server_never_failed(client: httpx.Client, server: RunningServer) -> None:
    assert client.get("/readyz").status_code == 200
    assert "Traceback" not in server.log()
