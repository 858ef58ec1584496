"""A repository that changes while it is served: new versions, bad ones, none, rollouts over HTTP.

No request is lost.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.checkpoint import WEIGHTS_FILE
from service.inference.rollout import ROLLOUT_FILE
from tests.support.images import draw_image
from tests.support.servers import (
    LABELS,
    RunningServer,
    change_config,
    change_file,
    copy_checkpoint,
    serve,
)
from tests.support.shared import HANG_SECONDS

TOKEN = "a-token-for-tests"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
IMAGE = draw_image("red", 11)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """It starts with an empty repository, which it reads often."""
    folder = tmp_path_factory.mktemp("server")
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_POLL_SECONDS": "0.1",
        "GRAFT_ADMIN_TOKEN": TOKEN,
    }
    with serve(folder / "log", env, until="/livez") as running:
        yield running


@pytest.fixture
def publish(
    colors: Path, server: RunningServer, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    """Puts a version of this test's own model into the repository, in one step.

    Each version has its own temperature, so that its scores tell which one answered.
    """
    name = name_of(request)
    root = server.log_path.parent

    def put(version: int, change: Callable[[Path], object] = lambda folder: None) -> Path:
        shutil.rmtree(root / "staged", ignore_errors=True)
        staged = copy_checkpoint(colors, root, "staged", version)
        change_config(staged, lambda config: config["graft"].update(temperature=float(version)))
        change(staged)
        target = root / "checkpoints" / name / str(version)
        target.parent.mkdir(parents=True, exist_ok=True)
        return staged.rename(target)

    return put


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return name_of(request)


def name_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.name).removeprefix("test_")[:40].strip("_").lower()


def until(condition: Callable[[], object], seconds: float = HANG_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def ask(client: httpx.Client, name: str, **options: str) -> dict[str, Any]:
    response = client.post(
        "/predict",
        params={"model": name, **options},
        content=IMAGE,
        headers={"Content-Type": "image/jpeg"},
    )
    body: dict[str, Any] = response.json()
    assert response.status_code == 200, body
    return body


def serves(client: httpx.Client, name: str, version: int) -> bool:
    return version_of(client, name) == version


def version_of(client: httpx.Client, name: str, **options: str) -> int | None:
    """The version that answers; None where the model is not served."""
    response = client.post(
        "/predict",
        params={"model": name, **options},
        content=IMAGE,
        headers={"Content-Type": "image/jpeg"},
    )
    if response.status_code in (404, 503):
        return None
    assert response.status_code == 200, response.text
    version: int = response.json()["version"]
    return version


def refusals(client: httpx.Client, name: str) -> dict[int | None, str]:
    return {
        one["version"]: one["reason"]
        for one in client.get("/v1/models").json()["refused"]
        if one["name"] == name
    }


def patch(
    client: httpx.Client, name: str, change: dict[str, object], status: int = 200
) -> dict[str, Any]:
    response = client.patch(f"/v1/models/{name}/rollout", json=change, headers=ADMIN)
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    return body


def test_a_checkpoint_put_into_an_empty_repository_is_served(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    assert client.get("/readyz").status_code in (200, 503)
    assert version_of(client, name) is None
    publish(1)
    until(lambda: version_of(client, name) == 1)
    assert client.get("/readyz").status_code == 200


def test_new_versions_take_over_under_load_and_no_request_is_lost(
    server: RunningServer, client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    until(lambda: version_of(client, name) == 1)
    expected = {}
    for version in range(1, 5):
        publish(version) if version > 1 else None
        until(functools.partial(serves, client, name, version))
        expected[version] = ask(client, name)["predictions"]
    for version in (2, 3, 4):
        shutil.rmtree(server.log_path.parent / "checkpoints" / name / str(version))
    until(lambda: version_of(client, name) == 1)

    is_over, seen, lock = threading.Event(), [], threading.Lock()

    def load() -> None:
        with httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as own:
            while not is_over.is_set():
                body = ask(own, name)
                # The scores are those of the named version: no answer is a mix of two.
                for found, wanted in zip(
                    body["predictions"][0]["top"], expected[body["version"]][0]["top"], strict=True
                ):
                    assert found["score"] == pytest.approx(wanted["score"], abs=1e-4)
                with lock:
                    seen.append(body["version"])

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            for version in (1, 2, 3, 4):
                publish(version) if version > 1 else None
                until(functools.partial(seen.__contains__, version))
        finally:
            is_over.set()
        for one in running:
            one.result()
    assert set(seen) == {1, 2, 3, 4}


def test_a_bad_version_is_refused_and_served_once_it_is_repaired(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    until(lambda: version_of(client, name) == 1)
    weights: list[bytes] = []

    def damage(folder: Path) -> None:
        weights.append((folder / WEIGHTS_FILE).read_bytes())
        change_file(
            folder / WEIGHTS_FILE, lambda data: data[:-1] + bytes([data[-1] ^ 1]), rehash=False
        )

    folder = publish(2, damage)
    until(lambda: 2 in refusals(client, name))
    assert WEIGHTS_FILE in refusals(client, name)[2]
    assert version_of(client, name) == 1
    (folder / WEIGHTS_FILE).write_bytes(weights[0])
    until(lambda: version_of(client, name) == 2)
    assert refusals(client, name) == {}


def test_after_a_version_is_removed_the_one_before_answers(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    folder = publish(2)
    until(lambda: version_of(client, name) == 2)
    shutil.rmtree(folder)
    until(lambda: version_of(client, name) == 1)
    shutil.rmtree(folder.parent)
    until(lambda: version_of(client, name) is None)


def test_a_version_that_is_replaced_under_its_number_is_loaded_again(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    folder = publish(1)
    until(lambda: version_of(client, name) == 1)
    before = ask(client, name)["predictions"][0]["score"]
    shutil.rmtree(folder)
    publish(
        1,
        lambda staged: change_config(
            staged, lambda config: config["graft"].update(temperature=3.0)
        ),
    )
    until(
        lambda: (
            version_of(client, name) == 1
            and ask(client, name)["predictions"][0]["score"] < before - 0.01
        )
    )


def test_labels_default_canary_load_and_unload(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    for version in (1, 2, 3):
        folder = publish(version)
    until(lambda: version_of(client, name) == 3)
    assert version_of(client, name, version="1") is None
    changed = patch(client, name, {"labels": {"stable": 2}, "default": "stable"})
    assert (changed["versions"], changed["persisted"]) == ([2, 3], True)
    assert json.loads((folder.parent / ROLLOUT_FILE).read_text()) == {
        "default": "stable",
        "labels": {"stable": 2},
    }
    assert [
        version_of(client, name, version=version) for version in ("", "stable", "latest", "3")
    ] == [2, 2, 3, 3]

    load = client.post(f"/v1/models/{name}/versions/1:load", headers=ADMIN)
    assert (load.status_code, load.json()["versions"]) == (200, [1, 2, 3])
    assert version_of(client, name, version="1") == 1

    patch(client, name, {"canary": {"version": 3, "share": 0.5}})
    assert {version_of(client, name) for _ in range(40)} == {2, 3}
    patch(client, name, {"canary": None, "default": None})
    assert version_of(client, name) == 3

    assert client.post(f"/v1/models/{name}/versions/3:unload", headers=ADMIN).status_code == 200
    assert version_of(client, name) == 2
    assert version_of(client, name, version="3") is None
    # A version that the rollout refers to is not unloaded.
    refused = client.post(f"/v1/models/{name}/versions/2:unload", headers=ADMIN)
    assert refused.status_code == 400
    assert "still referred to" in refused.json()["error"]["message"]


def test_a_rollout_that_cannot_be_served_changes_nothing(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    folder = publish(1)
    until(lambda: version_of(client, name) == 1)
    message = patch(client, name, {"default": 7}, 400)["error"]["message"]
    assert "version 7" in message
    assert version_of(client, name) == 1
    assert not (folder.parent / ROLLOUT_FILE).exists()
    # The same by hand is refused with the reason, and followed once the version is there.
    (folder.parent / ROLLOUT_FILE).write_text('{"default": 7}')
    until(lambda: None in refusals(client, name))
    assert "version 7" in refusals(client, name)[None]
    assert version_of(client, name) == 1
    publish(7)
    publish(8)
    until(lambda: version_of(client, name) == 7)
    until(lambda: refusals(client, name) == {})


def test_a_shadow_is_compared_and_never_sent(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    publish(2)
    until(lambda: version_of(client, name) == 2)
    patch(client, name, {"default": 1, "shadow": 2})
    assert {version_of(client, name) for _ in range(5)} == {1}
    wanted = f'graft_shadow_images_total{{model="{name}",outcome="agrees",version="2"}} 5.0'
    assert wanted in client.get("/metrics").text


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong-token"}, {"Authorization": f"Basic {TOKEN}"}]
)
def test_admin_routes_need_the_token(client: httpx.Client, headers: dict[str, str]) -> None:
    response = client.patch("/v1/models/any/rollout", json={}, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2f..%2fetc", "no-such-model", "a%00b", ".tmp-1", "A"]
)
def test_no_path_leads_out_of_the_repository(client: httpx.Client, name: str) -> None:
    response = client.post(f"/v1/models/{name}/versions/1:load", headers=ADMIN)
    assert response.status_code == 404, response.text


@pytest.mark.parametrize("version", ["0", "-1", "x", "99999999999999", "1.5"])
def test_a_version_is_a_whole_number(client: httpx.Client, version: str) -> None:
    response = client.post(f"/v1/models/any/versions/{version}:load", headers=ADMIN)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_parameter")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'"x"', b"[" * 100_000])
def test_a_rollout_that_is_not_an_object_is_refused(client: httpx.Client, body: bytes) -> None:
    response = client.patch("/v1/models/any/rollout", content=body, headers=ADMIN)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_request")


def test_all_models_answer_from_one_pass(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    until(lambda: version_of(client, name) == 1)
    bodies = ask(client, "all")["models"]
    served = {
        model["name"]: model["version"] for model in client.get("/v1/models").json()["models"]
    }
    assert {body["model"]: body["version"] for body in bodies} == served
    (own,) = [body for body in bodies if body["model"] == name]
    assert own["predictions"] == ask(client, name)["predictions"]
    assert own["predictions"][0]["label"] == "red"
    response = client.post(
        "/predict?model=all&version=1", content=IMAGE, headers={"Content-Type": "image/jpeg"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_parameter")


def test_status_has_health_and_load(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    until(lambda: version_of(client, name) == 1)
    status = client.get("/v1/status").json()
    assert (status["ready"], status["alive"], status["draining"], status["reason"]) == (
        True,
        True,
        False,
        "",
    )
    (backbone,) = status["backbones"]
    assert backbone["queue_images"] == 0
    assert backbone["num_versions"] >= status["num_models"] >= 1
    assert backbone["engine"].startswith("openvino")


def test_every_request_has_an_id_a_log_line_and_bounded_metrics(
    server: RunningServer, client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    publish(1)
    until(lambda: version_of(client, name) == 1)
    headers = {"Content-Type": "image/jpeg", "X-Request-ID": "from-the-client-1"}
    response = client.post("/predict", params={"model": name}, content=IMAGE, headers=headers)
    assert response.headers["x-request-id"] == "from-the-client-1"
    assert (
        len(client.get("/v1/models", headers={"X-Request-ID": 'bad "id"'}).headers["x-request-id"])
        == 32
    )
    for number in range(20):
        client.get(f"/wp-admin/{number}.php")

    def line() -> dict[str, Any]:
        lines = [
            json.loads(text) for text in server.log().splitlines() if text.startswith('{"time"')
        ]
        return next((one for one in lines if one["id"] == "from-the-client-1"), {})

    until(line)
    assert (line()["status"], line()["model"], line()["version"], line()["images"]) == (
        200,
        name,
        1,
        1,
    )
    assert line()["ms"] >= line()["predict_ms"] > 0
    text = client.get("/metrics").text
    assert 'route="other",status="404"' in text
    assert "wp-admin" not in text
    assert f'graft_images_total{{model="{name}",outcome="answered",version="1"}}' in text
    for series in (
        "graft_queue_seconds_bucket",
        "graft_decode_seconds_bucket",
        "graft_engine_seconds_bucket",
        "graft_batch_images_bucket",
    ):
        assert series in text
    assert 'graft_rejected_total{model="",reason="not_found",version=""}' in text


def test_the_series_of_an_unloaded_version_are_dropped(
    client: httpx.Client, publish: Callable[..., Path], name: str
) -> None:
    folder = publish(1)
    until(lambda: version_of(client, name) == 1)
    assert f'model="{name}"' in client.get("/metrics").text
    shutil.rmtree(folder.parent)
    until(lambda: f'model="{name}"' not in client.get("/metrics").text)


def test_with_a_token_for_predictions_only_health_is_open(colors: Path, tmp_path: Path) -> None:
    copy_checkpoint(colors, tmp_path / "checkpoints", "colors", 1)
    env = {
        "CHECKPOINTS": str(tmp_path / "checkpoints"),
        "GRAFT_API_TOKEN": TOKEN,
        "GRAFT_ACCESS_LOG": "false",
    }
    headers = {"Content-Type": "image/jpeg"}
    with (
        serve(tmp_path / "log", env) as server,
        httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client,
    ):
        for path in ("/livez", "/readyz", "/metrics", "/", "/docs.json"):
            assert client.get(path).status_code == 200, path
        for path in ("/v1/models", "/v1/status"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=ADMIN).status_code == 200
        assert client.post("/predict", content=IMAGE, headers=headers).status_code == 401
        answer = client.post("/predict", content=IMAGE, headers={**headers, **ADMIN})
        assert answer.json()["predictions"][0]["label"] in LABELS
        # Without GRAFT_ADMIN_TOKEN admin routes are off, and the API token is not enough.
        forbidden = client.patch("/v1/models/colors/rollout", json={}, headers=ADMIN)
        assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "forbidden")
        assert '{"time"' not in server.log()
        assert TOKEN not in server.log()


def test_a_version_with_other_labels_is_logged_and_counted(
    client: httpx.Client, server: RunningServer, publish: Callable[..., Path], name: str
) -> None:
    def count() -> float:
        text = client.get("/metrics").text
        series = f'graft_label_changes_total{{model="{name}"}} '
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(series))

    publish(1)
    until(lambda: serves(client, name, 1))
    publish(2)
    until(lambda: serves(client, name, 2))
    assert count() == 0
    others = [f"other {label}" for label in LABELS]
    publish(3, lambda folder: change_config(folder, lambda one: one.update(label_names=others)))
    until(lambda: serves(client, name, 3))
    assert count() == 1
    line = f"the labels of {name} changed: version 3 answers with other "
    assert line in server.log()
