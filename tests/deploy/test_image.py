"""Containers of the image that `make test-image` builds, started as a container engine would.

Their root is read-only, their user has no privileges, and the service is process 1.
"""

from __future__ import annotations

import csv
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from finetune.data.splits import load_splits
from models import checkpoint as checkpoints
from models.engine.engine import run
from models.prepared import build_engine
from models.scores import softmax
from tests.support.images import draw_image
from tests.support.servers import PROJECT_DIR

pytestmark = pytest.mark.image

USER_ID = 1034
FLAVOUR = os.environ.get("GRAFT_IMAGE_FLAVOUR", "cpu")
# torch with CUDA takes several thousand; there is no smaller wheel.
MAX_MEGABYTES_OVER_BASE = {"cpu": 450, "cuda": 8000}[FLAVOUR]

# What a container engine does: namespaces, a read-only root, /tmp in memory, no privileges.
_BOOT = """
set -e
root=$1 checkpoints=$2
shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind -o ro /sys "$root/sys"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount --bind /etc/hosts "$root/etc/hosts"
if [ -n "$checkpoints" ]; then
    mount --bind "$checkpoints" "$root/checkpoints"
    mount -o remount,bind,ro "$root/checkpoints"
fi
exec chroot "$root" /usr/bin/env -i "$@"
"""


@dataclass(frozen=True)
class Image:
    folder: Path

    @property
    def root(self) -> Path:
        return Path((self.folder / "mounted").read_text().strip())

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "image.json").read_text())["Docker"][
            "config"
        ]
        return config

    @property
    def project(self) -> Path:
        return self.folder / "project"

    def report(self, line: str) -> None:
        with (self.folder / "report").open("a") as file:
            file.write(f"  {line}\n")


@dataclass(frozen=True)
class Container:
    url: str
    process: subprocess.Popen[bytes]
    log_path: Path
    started: float

    @property
    def first(self) -> psutil.Process:
        """Process 1 of the container."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    @property
    def worker(self) -> psutil.Process:
        (child,) = (
            child for child in self.first.children() if "worker" in " ".join(child.cmdline())
        )
        return child

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def post(
        self, *images: bytes, timeout: float = 30, token: str = "", **options: str
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        files = [("images", (f"{index}.png", image)) for index, image in enumerate(images)]
        return httpx.post(
            f"{self.url}/predict", files=files, params=options, headers=headers, timeout=timeout
        )

    def stop(self, seconds: float = 15) -> int:
        self.first.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def boot(
    image: Image,
    folder: Path,
    env: dict[str, str] | None = None,
    *,
    checkpoints_dir: Path | None = None,
    serve_options: Sequence[str] | None = None,
) -> Iterator[Container]:
    """`docker run --read-only --tmpfs /tmp --cap-drop ALL -v checkpoints_dir:/checkpoints:ro`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = image.config
    user, group = config["User"].split(":")
    variables = [
        *config["Env"],
        f"BENTOML_PORT={port}",
        *(f"{name}={value}" for name, value in (env or {}).items()),
    ]
    no_privileges = [
        "setpriv",
        "--reuid",
        user,
        "--regid",
        group,
        "--clear-groups",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--no-new-privs",
    ]
    script = ["bash", "-c", _BOOT, "boot", str(image.root), str(checkpoints_dir or "")]
    command = [
        *script,
        "-C",
        config["WorkingDir"],
        *variables,
        *no_privileges,
        *config["Entrypoint"],
        *(config["Cmd"] if serve_options is None else serve_options),
    ]
    log_path = folder / "container.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    container = Container(f"http://127.0.0.1:{port}", process, log_path, time.monotonic())
    try:
        yield container
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)


def wait_until(condition: Callable[[], bool], seconds: float, container: Container) -> float:
    """The seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, f"not within {seconds:g} s:\n{container.log}"
        time.sleep(0.02)
    return time.monotonic() - start


def is_up(container: Container, path: str = "/readyz") -> bool:
    assert container.process.poll() is None, container.log
    with suppress(httpx.TransportError):
        return httpx.get(container.url + path, timeout=2).status_code == 200
    return False


def check_health(image: Image, container: Container) -> bool:
    """The image's own HEALTHCHECK, of its file system, in the network of the container."""
    shell, script = image.config["Healthcheck"]["Test"][1:]
    port = container.url.rsplit(":", 1)[1]
    check = [shell, f"{image.root}{script}"]
    return (
        subprocess.run(
            check, env={"PATH": os.environ["PATH"], "BENTOML_PORT": port}, stderr=subprocess.DEVNULL
        ).returncode
        == 0
    )


@pytest.fixture(scope="session")
def image() -> Image:
    folder = os.environ.get("GRAFT_IMAGE_DIR")
    if folder is None:
        pytest.skip("`make test-image` builds the image and then calls this")
    return Image(Path(folder))


@pytest.fixture(scope="session")
def checkpoint(image: Image) -> checkpoints.Checkpoint:
    return checkpoints.load_checkpoint(image.project / "checkpoints" / "digits" / "1")


@pytest.fixture(scope="session")
def pictures(image: Image) -> tuple[list[bytes], list[str]]:
    """The validation images of the project's run, and their labels."""
    (path,) = (image.project / "runs").glob("*/splits.csv")
    with path.open() as file:
        wanted = {
            row["path"]: row["label"] for row in csv.DictReader(file) if row["split"] == "val"
        }
    splits = load_splits("digits", data_root=Path("unused"), val_fraction=0.2, seed=0)
    known = {sample.key: sample for sample in (*splits.train, *splits.val)}
    return [known[path].read() for path in wanted], list(wanted.values())


def test_what_is_in_it(image: Image) -> None:
    config = image.config
    assert config["User"] == f"{USER_ID}:{USER_ID}"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert "3000/tcp" in config["ExposedPorts"]
    names = {
        path.name
        for folder in ("usr/bin", "usr/local/bin", "app/.venv/bin")
        for path in (image.root / folder).glob("*")
    }
    assert not names & {"gcc", "g++", "cc", "git", "uv"}
    packages = {
        path.name
        for path in next((image.root / "app/.venv/lib").iterdir())
        .joinpath("site-packages")
        .iterdir()
    }
    assert "openvino" in packages
    assert packages & {"torch", "timm"} == (set() if FLAVOUR == "cpu" else {"torch", "timm"})
    assert not packages & {"pip", "pytest"}
    # The build's secrets and tools.
    assert not (image.root / "etc/pip.conf").exists()
    assert not (image.root / "run/secrets").exists()
    certificates = "etc/ssl/certs/ca-certificates.crt"
    assert (image.root / certificates).read_bytes() == (
        image.folder / "rootfs" / certificates
    ).read_bytes()
    # No file that the user who serves could change.
    find = [
        "find",
        str(image.root / "app"),
        str(image.root / "home"),
        "!",
        "-user",
        "root",
        "-o",
        "-perm",
        "/022",
        "!",
        "-type",
        "l",
    ]
    assert subprocess.run(find, capture_output=True, text=True, check=True).stdout == ""


def test_its_size_and_licences(image: Image) -> None:
    sizes = {
        name: _num_bytes(path)
        for name, path in (("base", image.folder / "rootfs"), ("image", image.root))
    }
    megabytes = (sizes["image"] - sizes["base"]) / 1e6
    image.report(f"image {sizes['image'] / 1e6:.0f} MB, {megabytes:.0f} MB over its base")
    assert megabytes <= MAX_MEGABYTES_OVER_BASE
    script = (PROJECT_DIR / "deploy" / "contents.py").read_bytes()
    bom = json.loads(_run_inside(image, script, "--cyclonedx"))
    components = {component["name"]: component for component in bom["components"]}
    assert bom["bomFormat"] == "CycloneDX"
    without = [name for name, component in components.items() if not component.get("licenses")]
    assert not without, f"no licence is given by {without}"
    (weights,) = (
        component
        for component in bom["components"]
        if component["type"] == "machine-learning-model"
    )
    assert "apache-2.0" in weights["licenses"][0]["license"]["name"]
    assert {"openvino", "numpy", "bentoml", "libc6"} <= set(components)
    for line in _run_inside(image, script, "--no-system").decode().splitlines()[:6]:
        image.report(line)


def _num_bytes(folder: Path) -> int:
    return int(
        subprocess.run(
            ["du", "-sb", folder], capture_output=True, text=True, check=True
        ).stdout.split()[0]
    )


def _run_inside(image: Image, script: bytes, *arguments: str) -> bytes:
    variables = [
        variable for variable in image.config["Env"] if not variable.startswith("CHECKPOINTS")
    ]
    command = [
        "chroot",
        str(image.root),
        "/usr/bin/env",
        "-i",
        "-C",
        image.config["WorkingDir"],
        *variables,
        "python3",
        "-",
        *arguments,
    ]
    return subprocess.run(command, input=script, capture_output=True, check=True).stdout


def test_ready_in_time_right_and_no_request_lost_on_sigterm(
    image: Image,
    checkpoint: checkpoints.Checkpoint,
    pictures: tuple[list[bytes], list[str]],
    tmp_path: Path,
) -> None:
    with boot(image, tmp_path) as container:
        wait_until(lambda: is_up(container), 30, container)
        seconds = time.monotonic() - container.started
        image.report(f"ready {seconds:.1f} s after its start")
        assert seconds <= 10
        assert check_health(image, container)
        check_privileges(container)
        check_predictions(image, container, checkpoint, pictures)
        check_end(image, container, pictures[0])
        assert not check_health(image, container)


def check_privileges(container: Container) -> None:
    for process in (container.first, container.worker):
        status = Path("/proc", str(process.pid), "status").read_text()
        assert re.search(
            rf"^Uid:\t{USER_ID}\t{USER_ID}\t{USER_ID}\t{USER_ID}$", status, re.MULTILINE
        )
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        mounts = Path("/proc", str(process.pid), "mounts").read_text()
        assert re.search(r"^\S+ / \S+ ro,", mounts, re.MULTILINE)


def check_predictions(
    image: Image,
    container: Container,
    checkpoint: checkpoints.Checkpoint,
    pictures: tuple[list[bytes], list[str]],
) -> None:
    images, labels = pictures
    engine = build_engine(checkpoint.path, checkpoint.preprocess, checkpoint.config, device="cpu")
    features = run(engine, np.stack([checkpoint.preprocess(picture) for picture in images]))
    engine.close()
    wanted = softmax(checkpoints.logits(checkpoint, features) / checkpoint.temperature)
    found = np.zeros_like(wanted)
    right = 0
    for start in range(0, len(images), 60):
        answer = container.post(*images[start : start + 60], top_k="10")
        assert answer.status_code == 200, answer.text
        for index, prediction in enumerate(answer.json()["predictions"], start):
            right += prediction["label"] == labels[index]
            for one in prediction["top"]:
                found[index, checkpoint.label_names.index(one["label"])] = one["score"]
    difference = float(np.abs(found - wanted).max())
    (metrics,) = (image.project / "runs").glob("*/metrics.json")
    accuracy = json.loads(metrics.read_text())["val"]["accuracy"]
    image.report(
        f"{len(images)} predictions within {difference:.1g} of evaluation's; "
        f"accuracy {right / len(images):.4f}, its {accuracy:.4f}"
    )
    assert difference <= 1e-3
    assert right / len(images) == pytest.approx(accuracy, abs=1e-6)


def check_end(image: Image, container: Container, images: list[bytes]) -> None:
    """Eight clients behind a balancer that asks /readyz every 50 ms: no request is lost."""
    answers: list[tuple[float, int | str]] = []
    is_ready = True

    def ask(method: str, path: str, image: bytes = b"") -> int | str:
        # Not httpx: it takes longer to make a client than the server takes to answer.
        connection = http.client.HTTPConnection(
            "127.0.0.1", int(container.url.rsplit(":", 1)[1]), timeout=20
        )
        try:
            connection.request(method, path, image, {"Content-Type": "image/png"})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        finally:
            connection.close()

    def send(client: int) -> None:
        number = client
        while is_ready:
            status = ask("POST", "/predict", images[number % len(images)])
            answers.append((time.monotonic(), status))
            number += 8

    with ThreadPoolExecutor(8) as clients:
        sending = [clients.submit(send, client) for client in range(8)]
        time.sleep(1.5)
        stopped = time.monotonic()
        container.first.send_signal(signal.SIGTERM)
        while ask("GET", "/readyz") == 200:
            time.sleep(0.05)
        is_ready = False
        noticed = time.monotonic() - stopped
        for one in sending:
            one.result()
    assert container.process.wait(15) == 0, container.log
    seconds = time.monotonic() - stopped
    lost = [status for _, status in answers if status != 200]
    after = sum(ended > stopped for ended, _ in answers)
    image.report(
        f"SIGTERM under load: exit 0 after {seconds:.1f} s, {len(answers)} requests, "
        f"{after} ended after it, {len(lost)} lost"
    )
    assert after
    assert not lost, f"/readyz turned {noticed:.2f} s after SIGTERM: {lost[:10]}"
    assert seconds < 10


def test_a_checkpoint_dropped_into_an_empty_mount_is_served(
    image: Image,
    checkpoint: checkpoints.Checkpoint,
    pictures: tuple[list[bytes], list[str]],
    tmp_path: Path,
) -> None:
    mounted = tmp_path / "checkpoints"
    mounted.mkdir()
    _let_in(mounted)
    with boot(
        image, tmp_path, {"CHECKPOINTS": "/checkpoints"}, checkpoints_dir=mounted
    ) as container:
        wait_until(lambda: is_up(container, "/livez"), 30, container)
        assert check_health(image, container)
        assert httpx.get(f"{container.url}/readyz").status_code == 503
        shutil.copytree(checkpoint.path, mounted / "digits" / "1")
        seconds = wait_until(lambda: is_up(container), 30, container)
        image.report(
            f"a checkpoint dropped into an empty /checkpoints: served after {seconds:.1f} s"
        )
        assert seconds <= 5
        assert container.post(*pictures[0][:48]).json()["model"] == "digits"
        assert container.stop() == 0


def test_without_its_worker_the_container_ends(image: Image, tmp_path: Path) -> None:
    with boot(image, tmp_path) as container:
        wait_until(lambda: is_up(container), 30, container)
        container.worker.kill()
        killed = time.monotonic()
        code = container.process.wait(15)
        seconds = time.monotonic() - killed
        image.report(f"kill -9 of the worker: the container ends with {code} after {seconds:.1f} s")
        assert code != 0
        assert seconds <= 5


def test_limits_and_choices_reach_the_process(
    image: Image,
    checkpoint: checkpoints.Checkpoint,
    pictures: tuple[list[bytes], list[str]],
    tmp_path: Path,
) -> None:
    mounted = tmp_path / "checkpoints"
    shutil.copytree(checkpoint.path, mounted / "digits" / "1")
    _let_in(mounted)
    token, admin = "a-token-of-the-tests", "another-token-of-the-tests"
    env = {
        "CHECKPOINTS": "/checkpoints",
        "GRAFT_ACCESS_LOG": "false",
        "GRAFT_ADMIN_TOKEN": admin,
        "GRAFT_API_TOKEN": token,
        "GRAFT_BODY_SECONDS": "1",
        "GRAFT_CACHED_IMAGES": "10",
        "GRAFT_DEVICE": "cpu",
        "GRAFT_HEADER_SECONDS": "1",
        "GRAFT_MAX_BODY_BYTES": "100000",
        "GRAFT_MAX_IMAGES": "3",
        "GRAFT_MAX_PIXELS": "1000",
        "GRAFT_MAX_QUEUE_IMAGES": "3",
        "GRAFT_POLL_SECONDS": "0",
        "GRAFT_PRECISION": "fp32",
    }
    small = pictures[0][0]
    with boot(image, tmp_path, env, checkpoints_dir=mounted) as container:
        wait_until(lambda: is_up(container), 30, container)
        assert container.post(small).status_code == 401
        found = {"GRAFT_API_TOKEN": container.post(small, token=token).status_code == 200}
        found["GRAFT_ACCESS_LOG"] = '"/predict"' not in container.log
        rollout = httpx.patch(
            f"{container.url}/v1/models/digits/rollout",
            json={},
            headers={"Authorization": f"Bearer {admin}"},
        )
        found["GRAFT_ADMIN_TOKEN"] = rollout.status_code == 200
        head = (
            f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            "Content-Type: image/png\r\nContent-Length: 500\r\n\r\n"
        )
        found["GRAFT_BODY_SECONDS"] = _send_part(container, f"{head}x") == 408
        found["GRAFT_HEADER_SECONDS"] = _send_part(container, head[:50]) == 408
        assert container.post(small, token=token).status_code == 200
        found["GRAFT_CACHED_IMAGES"] = (
            'graft_cached_features_total{found="' in httpx.get(f"{container.url}/metrics").text
        )
        found["GRAFT_MAX_BODY_BYTES"] = (
            container.post(b"x" * 100_001, token=token).status_code == 413
        )
        found["GRAFT_MAX_IMAGES"] = container.post(*[small] * 4, token=token).status_code == 413
        found["GRAFT_MAX_PIXELS"] = (
            container.post(draw_image("red", size=(40, 40)), token=token).status_code == 413
        )
        with ThreadPoolExecutor(12) as clients:
            statuses = set(
                clients.map(
                    lambda seed: (
                        container.post(*pictures[0][seed : seed + 3], token=token).status_code
                    ),
                    range(100, 136),
                )
            )
        found["GRAFT_MAX_QUEUE_IMAGES"] = 429 in statuses
        status = httpx.get(
            f"{container.url}/v1/status", headers={"Authorization": f"Bearer {token}"}
        ).json()
        found["GRAFT_PRECISION"] = status["backbones"][0]["precision"] == "fp32"
        shutil.copytree(checkpoint.path, mounted / "other" / "1")
        time.sleep(2.5)
        models = httpx.get(
            f"{container.url}/v1/models", headers={"Authorization": f"Bearer {token}"}
        ).json()["models"]
        found["GRAFT_POLL_SECONDS"] = [model["name"] for model in models] == ["digits"]
        assert all(found.values()), found


def test_times_reach_the_process(
    image: Image, pictures: tuple[list[bytes], list[str]], tmp_path: Path
) -> None:
    env = {
        "GRAFT_DEADLINE_SECONDS": "0.0001",
        "GRAFT_DRAIN_SECONDS": "2",
        "GRAFT_MAX_BUFFERED_BYTES": "20000",
        "GRAFT_SHUTDOWN_SECONDS": "4",
    }
    with boot(image, tmp_path, env, serve_options=["--timeout-keep-alive", "2"]) as container:
        wait_until(lambda: is_up(container), 30, container)
        late = container.post(pictures[0][0])
        assert late.status_code in (429, 504), late.text
        assert "buffer" not in late.text
        too_much = container.post(b"x" * 30_000)
        assert too_much.status_code == 429, too_much.text
        port = int(container.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=4) as silent:
            silent.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert silent.recv(4096).startswith(b"HTTP/1.1 200 ")
            answered = time.monotonic()
            assert silent.recv(4096) == b""
            assert 1.5 <= time.monotonic() - answered <= 3.5
        with socket.create_connection(("127.0.0.1", port)) as held:
            # A body that never ends would hold the server; GRAFT_SHUTDOWN_SECONDS does not let it.
            held.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: image/png\r\nContent-Length: 500\r\n\r\nx"
            )
            time.sleep(0.2)
            stopped = time.monotonic()
            container.first.send_signal(signal.SIGTERM)
            wait_until(lambda: _is_silent(container), 8, container)
            assert 1.5 <= time.monotonic() - stopped <= 3.7
            assert container.process.wait(10) == 0
            assert 3.5 <= time.monotonic() - stopped <= 7


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GRAFT_DEVICE": "cuda"}, "cuda"),
        ({"GRAFT_TRACING": "perhaps"}, "GRAFT_TRACING=perhaps"),
        ({"GRAFT_MAX_IMAGES": "0"}, "GRAFT_MAX_IMAGES=0"),
    ],
)
def test_what_cannot_be_is_said(
    image: Image, env: dict[str, str], message: str, tmp_path: Path
) -> None:
    with boot(image, tmp_path, env) as container:

        def is_said() -> bool:
            if container.process.poll() is not None:
                return True
            with suppress(httpx.TransportError):
                return "no_model" in httpx.get(f"{container.url}/readyz", timeout=2).text
            return False

        end = time.monotonic() + 30
        while not is_said():
            assert time.monotonic() < end, container.log
            time.sleep(0.05)
        assert message in container.log


def _let_in(folder: Path) -> None:
    """Let the container's user read what is mounted: pytest's folders are private."""
    for one in (folder, *folder.rglob("*")):
        one.chmod(0o755 if one.is_dir() else 0o644)


def _is_silent(container: Container) -> bool:
    """Whether no request is answered any more; BentoML's parent still accepts connections."""
    try:
        httpx.get(f"{container.url}/livez", timeout=0.5)
    except httpx.TransportError:
        return True
    return False


def _send_part(container: Container, part: str) -> int:
    """The status of the answer to a request that never ends."""
    port = int(container.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(part.encode())
        return int(connection.recv(4096).split()[1])
