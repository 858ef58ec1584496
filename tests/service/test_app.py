"""The real server over HTTP: every way to send an image and to get it wrong, many clients.

Also the Bento, and the end of the process.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import bentoml
import httpx
import pytest

from models.checkpoint import WEIGHTS_FILE
from tests.support.images import draw_image
from tests.support.servers import (
    LABELS,
    PROJECT_DIR,
    RunningServer,
    change_file,
    copy_checkpoint,
    serve,
)
from tests.support.shared import HANG_SECONDS

MAX_IMAGES = 8
MAX_BODY_BYTES = 2_000_000
MAX_PIXELS = 1_000_000


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One model with a good version and a corrupted newer one, and small limits."""
    folder = tmp_path_factory.mktemp("server")
    copy_checkpoint(colors, folder / "checkpoints", "colors", 1)
    corrupted = copy_checkpoint(colors, folder / "checkpoints", "colors", 2)
    change_file(
        corrupted / WEIGHTS_FILE, lambda data: data[:-1] + bytes([data[-1] ^ 1]), rehash=False
    )
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_MAX_IMAGES": str(MAX_IMAGES),
        "GRAFT_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "GRAFT_MAX_PIXELS": str(MAX_PIXELS),
        "GRAFT_BODY_SECONDS": "1",
    }
    with serve(folder / "log", env) as running:
        yield running


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"photo{index}.jpg", image)) for index, image in enumerate(images)]


def labels_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [entry.get("label", "unreadable") for entry in response.json()["predictions"]]


def check_error(response: httpx.Response, status: int, code: str) -> str:
    """The one error shape; returns the message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] == code
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert len(message) > 10
    assert "Traceback" not in message
    return message


def test_one_file(client: httpx.Client) -> None:
    response = client.post("/predict", files=files(draw_image("green")))
    assert labels_of(response) == ["green"]
    assert (response.json()["model"], response.json()["version"]) == ("colors", 1)
    (prediction,) = response.json()["predictions"]
    assert prediction["top"][0]["label"] == "green"
    assert sum(one["score"] for one in prediction["top"]) == pytest.approx(1, abs=1e-4)


def test_an_answer_says_whether_it_is_unsure_and_the_model_at_what_coverage(
    client: httpx.Client,
) -> None:
    (prediction,) = client.post("/predict", files=files(draw_image("green"))).json()["predictions"]
    (info,) = client.get("/v1/models").json()["models"]
    assert (info["coverage"], info["threshold"]) == (0.9, 0.5)
    assert prediction["unsure"] is (prediction["score"] < 0.5)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("is_form", [True, False], ids=["form", "raw"])
def test_a_compressed_body(client: httpx.Client, encoding: str, is_form: bool) -> None:
    image = draw_image("green")
    plain = client.build_request(
        "POST",
        "/predict",
        files=files(image) if is_form else None,
        content=None if is_form else image,
        headers={} if is_form else {"content-type": "image/jpeg"},
    )
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    response = client.post(
        "/predict",
        content=compress(plain.read()),
        headers={"content-type": plain.headers["content-type"], "content-encoding": encoding},
    )
    assert labels_of(response) == ["green"]


def test_a_body_that_is_compressed_wrongly(client: httpx.Client) -> None:
    image = draw_image("green")
    packed = gzip.compress(image)
    for content, encoding, status, code, words in (
        (packed, None, 415, "unsupported_encoding", "compressed with gzip and no header says so"),
        (packed, "br", 415, "unsupported_encoding", "'br'"),
        (packed, "zstd", 415, "unsupported_encoding", "'zstd'"),
        (image, "gzip", 400, "broken_encoding", "not whole gzip"),
        (packed[:-9], "gzip", 400, "broken_encoding", "too soon"),
        (packed, "deflate", 400, "broken_encoding", "not whole deflate"),
        (gzip.compress(bytes(2**30)), "gzip", 413, "body_too_large", "decompressed"),
    ):
        headers = {"content-type": "image/jpeg"}
        headers |= {} if encoding is None else {"content-encoding": encoding}
        response = client.post("/predict", content=content, headers=headers)
        assert words in check_error(response, status, code)
        accepted = "gzip, deflate" if status == 415 else None
        assert response.headers.get("accept-encoding") == accepted


def test_a_compressed_file_in_a_form_is_called_compressed(client: httpx.Client) -> None:
    packed = gzip.compress(draw_image("green"))
    response = client.post("/predict", files=files(packed))
    assert "compressed with gzip" in check_error(response, 400, "unreadable_image")


def test_many_files_in_order_with_options(client: httpx.Client) -> None:
    wanted = ["blue", "red", "green", "red", "blue"]
    response = client.post(
        "/predict", files=files(*map(draw_image, wanted)), data={"model": "colors", "top_k": "2"}
    )
    assert labels_of(response) == wanted
    assert all(len(entry["top"]) == 2 for entry in response.json()["predictions"])


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "image/png", "image/whatever", "application/octet-stream", None]
)
def test_a_raw_body(client: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = client.post("/predict?top_k=1", content=draw_image("red"), headers=headers)
    assert labels_of(response) == ["red"]
    assert len(response.json()["predictions"][0]["top"]) == 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_by_its_content(client: httpx.Client, kind: str) -> None:
    assert labels_of(client.post("/predict", files=files(draw_image("blue", kind=kind)))) == [
        "blue"
    ]


def test_a_chunked_body(client: httpx.Client) -> None:
    image = draw_image("red")
    parts = (image[start : start + 1000] for start in range(0, len(image), 1000))
    assert labels_of(
        client.post("/predict", content=parts, headers={"content-type": "image/jpeg"})
    ) == ["red"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl_as_the_readme_types_it(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(draw_image("green"))
    for options in (
        ["-F", "images=@x.jpg"],
        ["--data-binary", "@x.jpg", "-H", "Content-Type: image/jpeg"],
    ):
        answer = subprocess.run(
            ["curl", "-sS", *options, f"{server.url}/predict"],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        assert json.loads(answer.stdout)["predictions"][0]["label"] == "green"


def test_bentomls_client(server: RunningServer, tmp_path: Path) -> None:
    paths = []
    for label in LABELS:
        paths.append(tmp_path / f"{label}.jpg")
        paths[-1].write_bytes(draw_image(label))
    with bentoml.SyncHTTPClient(server.url) as client:
        answer = client.predict(images=paths, top_k=3, model="colors")
        assert [entry["label"] for entry in answer["predictions"]] == LABELS
        assert client.predict(images=paths[:1])["predictions"][0]["label"] == LABELS[0]


def test_a_bad_image_among_good_ones_fails_alone(client: httpx.Client) -> None:
    good = draw_image("red")
    response = client.post(
        "/predict", files=files(good, b"no image", good[:300], draw_image("blue"))
    )
    assert labels_of(response) == ["red", "unreadable", "unreadable", "blue"]
    entry = response.json()["predictions"][1]
    assert entry["error"]["code"] == "unreadable_image"
    assert "photo1.jpg" in entry["error"]["message"]


def test_no_readable_image_is_an_error(client: httpx.Client) -> None:
    check_error(client.post("/predict", files=files(b"no image")), 400, "unreadable_image")
    message = check_error(
        client.post("/predict", files=files(b"no image", b"none either")), 400, "unreadable_image"
    )
    assert "none of the 2 images" in message
    check_error(
        client.post("/predict", content=b"x", headers={"content-type": "image/jpeg"}),
        400,
        "unreadable_image",
    )
    too_large = draw_image("red", size=(1200, 1000))
    message = check_error(client.post("/predict", files=files(too_large)), 413, "image_too_large")
    assert "1200x1000" in message


def test_no_image_at_all(client: httpx.Client) -> None:
    check_error(
        client.post("/predict", content=b"", headers={"content-type": "image/jpeg"}),
        400,
        "no_image",
    )
    only_options = {"top_k": (None, "3")}
    check_error(client.post("/predict", files=only_options), 400, "no_image")


def test_text_in_the_place_of_a_file_is_not_fetched(client: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/photo.jpg"
        check_error(client.post("/predict", files={"images": (None, url)}), 400, "no_image")
        check_error(
            client.post("/predict", json={"images": [url]}), 415, "unsupported_content_type"
        )
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        ({"model": "cats"}, 404, "no_such_model"),
        ({"model": "../colors"}, 404, "no_such_model"),
        ({"model": "x" * 5000}, 400, "bad_parameter"),
        ({"top_k": "0"}, 400, "bad_parameter"),
        ({"top_k": "-1"}, 400, "bad_parameter"),
        ({"top_k": "1.5"}, 400, "bad_parameter"),
        ({"top_k": "\N{FULLWIDTH DIGIT NINE}"}, 400, "bad_parameter"),
        ({"top_k": "9" * 500}, 400, "bad_parameter"),
        ({"top_k": "0000000001" + "0" * 990}, 400, "bad_parameter"),
        ({"mdoel": "colors"}, 400, "unknown_field"),
    ],
)
def test_bad_options(client: httpx.Client, data: dict[str, str], status: int, code: str) -> None:
    check_error(client.post("/predict", files=files(draw_image("red")), data=data), status, code)


def test_a_file_in_another_field(client: httpx.Client) -> None:
    message = check_error(
        client.post("/predict", files={"file": ("x.jpg", b"x")}), 400, "unknown_field"
    )
    assert "'images'" in message


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", None]
)
def test_another_content_type(client: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    message = check_error(
        client.post("/predict", content=b"{}", headers=headers), 415, "unsupported_content_type"
    )
    assert "curl -F images=@" in message
    assert ("POST /v1/models/NAME:predict" in message) == (content_type == "application/json")


def test_a_header_without_its_boundary_is_told(client: httpx.Client) -> None:
    response = client.post(
        "/predict",
        files=files(draw_image("red")),
        headers={"content-type": "multipart/form-data"},
    )
    message = check_error(response, 400, "broken_multipart")
    assert "do not set this header, the client library does" in message


@pytest.mark.parametrize(
    ("query", "form", "status"),
    [
        ({"model": "colors"}, {"model": "colors"}, 200),
        ({"model": "colors"}, {"model": ""}, 200),
        ({"model": ""}, {"model": "colors"}, 200),
        ({"model": "colors"}, {"model": "cats"}, 400),
        ({"model": "cats"}, {"model": "colors"}, 400),
        ({"top_k": "1"}, {"top_k": "2"}, 400),
        ({"version": "1"}, {"version": "latest"}, 400),
    ],
)
def test_query_and_form_do_not_contradict(
    client: httpx.Client, query: dict[str, str], form: dict[str, str], status: int
) -> None:
    response = client.post("/predict", params=query, files=files(draw_image("red")), data=form)
    if status == 200:
        assert labels_of(response) == ["red"]
    else:
        assert "send it once" in check_error(response, status, "bad_parameter")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 1000, b""),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"no boundary at all"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\ncut',
        ),
        (
            "multipart/form-data; boundary=b",
            b"--b\r\n" + b"A" * 10_000 + b": x\r\n\r\nx\r\n--b--\r\n",
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nbad header\r\n\r\nx\r\n--b--\r\n"),
    ],
    ids=["none", "empty", "long", "no body", "no part", "cut off", "long header", "bad header"],
)
def test_a_broken_multipart_body(client: httpx.Client, content_type: str, body: bytes) -> None:
    check_error(
        client.post("/predict", content=body, headers={"content-type": content_type}),
        400,
        "broken_multipart",
    )


def test_too_many_images(client: httpx.Client) -> None:
    small = draw_image("red", size=(32, 32))
    assert len(labels_of(client.post("/predict", files=files(*[small] * MAX_IMAGES)))) == MAX_IMAGES
    check_error(
        client.post("/predict", files=files(*[small] * (MAX_IMAGES + 1))), 413, "too_many_images"
    )


def test_a_body_that_is_too_large_by_its_header_and_by_its_size(client: httpx.Client) -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)
    headers = {"content-type": "image/jpeg"}
    check_error(client.post("/predict", content=body, headers=headers), 413, "body_too_large")
    chunks = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    check_error(client.post("/predict", content=chunks, headers=headers), 413, "body_too_large")


def test_a_body_that_does_not_come(server: RunningServer) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 100\r\n\r\nabc"
        )
        answer = b""
        while b"body_timeout" not in answer and (received := connection.recv(10_000)):
            answer += received
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"body_timeout"' in answer


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (
            f"POST /nothing HTTP/1.1\r\nConnection: close\r\nContent-Length: {MAX_BODY_BYTES}",
            404,
            "not_found",
        ),
        (f"PUT /predict HTTP/1.0\r\nContent-Length: {MAX_BODY_BYTES}", 405, "method_not_allowed"),
        (
            "POST /predict HTTP/1.0\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {2 * MAX_BODY_BYTES}",
            413,
            "body_too_large",
        ),
    ],
)
def test_an_early_answer_reaches_who_is_still_sending(
    server: RunningServer, head: str, status: int, code: str
) -> None:
    """As proxies do, which close after each request.

    A close with bytes unread would reset the connection, and the answer would be lost.
    """
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
        body = bytes(int(head.rpartition(" ")[2]))
        for start in range(0, len(body), 100_000):
            connection.sendall(body[start : start + 100_000])
        answer = b""
        while received := connection.recv(10_000):
            answer += received
    assert int(answer.split()[1]) == status
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == code


@pytest.mark.alone
def test_a_client_that_is_answered_early_and_stops_or_sends_without_end_is_cut_off(
    server: RunningServer,
) -> None:
    """Within the body's limit, 1 s here, and the answer comes first."""
    address = urlsplit(server.url)
    for is_silent in (True, False):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(
                b"POST /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Length: 1000000000\r\n\r\n"
            )
            started = time.monotonic()
            answer = b""
            while b"not_found" not in answer and (received := connection.recv(10_000)):
                answer += received
            assert b"not_found" in answer
            with suppress(ConnectionError):
                while is_silent and connection.recv(1000):
                    pass
                while not is_silent and time.monotonic() - started < 5:
                    connection.sendall(b"more")
                    time.sleep(0.01)
            assert time.monotonic() - started < 5


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    check_error(client.get("/models"), 404, "not_found")
    check_error(client.post("/predict/../../etc/passwd"), 404, "not_found")
    check_error(client.get("/predict"), 405, "method_not_allowed")
    check_error(client.delete("/v1/models"), 405, "method_not_allowed")


def test_the_list_of_models(client: httpx.Client) -> None:
    body = client.get("/v1/models").json()
    (model,) = body["models"]
    assert (model["name"], model["version"], model["labels"]) == ("colors", 1, LABELS)
    assert model["metrics"] == {"val": {"accuracy": 1.0}}
    assert model["engine"].startswith("openvino")
    assert model["precision"] in ("bf16", "fp32")
    assert model["device"]
    (refused,) = body["refused"]
    assert (refused["name"], refused["version"]) == ("colors", 2)
    assert WEIGHTS_FILE in refused["reason"]


def test_health_metrics_and_the_page(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 200
    assert 'graft_model_loaded{model="colors",version="1"} 1.0' in client.get("/metrics").text
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text.replace(str(client.base_url), "")
    assert "https://" not in page.text


def test_the_openapi_page_tells_the_truth(client: httpx.Client) -> None:
    spec = client.get("/docs.json").json()
    operation = spec["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert {parameter["name"] for parameter in operation["parameters"]} == {
        "model",
        "version",
        "top_k",
    }
    assert {"200", "400", "404", "413", "415", "429", "503"} <= set(operation["responses"])
    references = set(json.dumps(spec).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(
        spec["components"]["schemas"]
    )
    assert "/v1/models" in spec["paths"]


def test_32_clients_with_good_and_broken_files(server: RunningServer) -> None:
    def send(number: int) -> None:
        label = LABELS[number % 3]
        good, kind = draw_image(label, number), number % 4
        with httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
            for _ in range(4):
                if kind == 0:
                    check_error(
                        client.post("/predict", files=files(good[: 100 + number])),
                        400,
                        "unreadable_image",
                    )
                elif kind == 1:
                    assert labels_of(client.post("/predict", files=files(good, b"bad", good))) == [
                        label,
                        "unreadable",
                        label,
                    ]
                elif kind == 2:
                    assert labels_of(
                        client.post(
                            "/predict", content=good, headers={"content-type": "image/jpeg"}
                        )
                    ) == [label]
                else:
                    assert labels_of(client.post("/predict", files=files(good))) == [label]

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(send, range(32)))


def test_clients_that_hang_up_harm_nobody(server: RunningServer, client: httpx.Client) -> None:
    address = urlsplit(server.url)
    image = draw_image("red")
    head = (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: %d\r\n\r\n" % len(image)
    )
    for num_bytes in (0, 10, len(image) // 2, len(image)):
        for _ in range(5):
            with socket.create_connection(
                (address.hostname, address.port), timeout=10
            ) as connection:
                connection.sendall(head + image[:num_bytes])
    assert labels_of(client.post("/predict", files=files(image))) == ["red"]
    assert "Traceback" not in server.log()


def test_without_a_model_the_server_lives_and_says_how_to_make_one(tmp_path: Path) -> None:
    with serve(tmp_path / "log", {"CHECKPOINTS": str(tmp_path / "none")}, until="/livez") as server:
        end = time.monotonic() + HANG_SECONDS
        while (ready := httpx.get(f"{server.url}/readyz")).json()["error"]["code"] == "not_ready":
            assert time.monotonic() < end
            time.sleep(0.05)
        for response in (
            ready,
            httpx.post(f"{server.url}/predict", files=files(draw_image("red"))),
        ):
            message = check_error(response, 503, "no_model")
            assert "make run" in message
            assert "CHECKPOINTS" in message
        assert httpx.get(f"{server.url}/v1/models").json() == {"models": [], "refused": []}
        assert httpx.get(f"{server.url}/livez").status_code == 200


@pytest.fixture(scope="module")
def bento_dir(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Bento of a copy of this project with two models, built and moved elsewhere."""
    folder = tmp_path_factory.mktemp("bento")
    project = folder / "project"
    for name in ("service", "models"):
        shutil.copytree(
            PROJECT_DIR / name, project / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in (
        "bentofile.yaml",
        "constraints.txt",
        "deploy/Dockerfile.j2",
        "deploy/healthcheck.sh",
    ):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT_DIR / name, project / name)
    (project / "README.md").write_text("# Graft\n")
    for name in ("first", "second"):
        copy_checkpoint(colors, project / "checkpoints", name, 1)
    for unwanted in (
        "data/photo.jpg",
        "runs/one/metrics.json",
        "tests/test_x.py",
        "finetune/run.py",
        "checkpoints/first/.tmp-1/x",
    ):
        (project / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (project / unwanted).write_text("unwanted")
    env = {**os.environ, "BENTOML_HOME": str(folder / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    command = Path(sys.executable).with_name("bentoml")
    subprocess.run([command, "build"], cwd=project, env=env, capture_output=True, check=True)
    (built,) = (path for path in (folder / "home" / "bentos" / "graft").iterdir() if path.is_dir())
    # Not exported: the archive of `bentoml export` holds this very folder, and takes half a minute.
    unpacked = folder / "unpacked"
    shutil.move(built, unpacked)
    shutil.rmtree(project)
    shutil.rmtree(folder / "home")
    return unpacked


def test_the_bento_holds_what_serving_needs_and_nothing_else(bento_dir: Path) -> None:
    source = bento_dir / "src"
    assert {path.name for path in source.iterdir()} == {
        "service",
        "models",
        "checkpoints",
        "deploy",
        "bentofile.yaml",
        "constraints.txt",
    }
    assert [path.name for path in (source / "deploy").iterdir()] == ["healthcheck.sh"]
    assert sorted(path.name for path in (source / "checkpoints").iterdir()) == ["first", "second"]
    assert [path.name for path in (source / "checkpoints" / "first").iterdir()] == ["1"]
    assert not list(source.rglob("__pycache__"))
    requirements = (bento_dir / "env" / "python" / "requirements.txt").read_text()
    assert "openvino==" in requirements
    assert "torch" not in requirements


def test_the_bento_serves_from_elsewhere_without_torch_until_sigterm(
    bento_dir: Path, tmp_path: Path
) -> None:
    no_torch = tmp_path / "no_torch"
    no_torch.mkdir()
    # Python imports sitecustomize at its start: in the server's processes `import torch` fails as
    # where it is not installed.
    (no_torch / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = None\nsys.modules['timm'] = None\n"
    )
    env = {"PYTHONPATH": str(no_torch), "GRAFT_MAX_QUEUE_IMAGES": "64", "GRAFT_DRAIN_SECONDS": "4"}
    with serve(tmp_path / "log", env, cwd=tmp_path, target=str(bento_dir)) as server:
        post = f"{server.url}/predict"
        image = draw_image("blue")
        message = check_error(httpx.post(post, files=files(image)), 400, "model_required")
        assert "first, second" in message
        assert labels_of(httpx.post(post, files=files(image), data={"model": "second"})) == ["blue"]
        assert labels_of(httpx.post(f"{post}?model=first", files=files(image))) == ["blue"]
        check_models_share_a_backbone(server)
        check_overload_is_refused_early(server)
        check_sigterm_finishes_what_is_in(server)


def check_models_share_a_backbone(server: RunningServer) -> None:
    models = httpx.get(f"{server.url}/v1/models").json()["models"]
    assert [model["name"] for model in models] == ["first", "second"]
    assert models[0]["fingerprint"] == models[1]["fingerprint"]


def check_overload_is_refused_early(server: RunningServer) -> None:
    """Eight times 48 images at once, into a queue for 64."""
    body = files(*[draw_image("red", size=(1000, 800))] * 48)

    def send(_: int) -> httpx.Response:
        return httpx.post(
            f"{server.url}/predict", files=body, data={"model": "first"}, timeout=HANG_SECONDS
        )

    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(send, range(8)))
    answered = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code != 200]
    assert answered
    assert refused
    for response in answered:
        assert labels_of(response) == ["red"] * 48
    for response in refused:
        check_error(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1


def check_sigterm_finishes_what_is_in(server: RunningServer) -> None:
    answers = []
    body = files(*[draw_image("green", size=(1000, 800))] * 60)
    sending = threading.Thread(
        target=lambda: answers.append(
            httpx.post(
                f"{server.url}/predict", files=body, data={"model": "first"}, timeout=HANG_SECONDS
            )
        )
    )
    sending.start()
    time.sleep(0.15)
    server.process.terminate()
    # The signal reaches the worker by way of another process.
    while (ready := httpx.get(f"{server.url}/readyz")).status_code == 200:
        time.sleep(0.05)
    check_error(ready, 503, "shutting_down")
    sending.join()
    assert labels_of(answers[0]) == ["green"] * 60
    assert server.process.wait(HANG_SECONDS) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/readyz", timeout=2)
