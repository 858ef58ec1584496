"""What the tests of the service share: small checkpoints and a real server on a free port."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from models import checkpoint as checkpoints
from models.checkpoint import Golden
from models.engine.engine import run
from models.prepared import prepare_backbone
from tests.support.images import COLORS, draw_image
from tests.support.shared import HANG_SECONDS

PROJECT_DIR = Path(__file__).resolve().parents[2]
LABELS = list(COLORS)


def publish_colors(repository: Path, name: str = "colors") -> Path:
    """Publish the embedded backbone with a head that tells the three colours apart."""
    cache_dir = Path(os.environ["XDG_CACHE_HOME"]) / "graft"
    backbone = prepare_backbone(
        "tf_efficientnet_lite0",
        weights=None,
        pretrained=True,
        image_size=None,
        cache_dir=cache_dir,
        scratch_dir=repository.parent,
    )
    engine = backbone.open_engine("cpu", "auto")
    images = [draw_image(label, seed) for seed in range(4) for label in LABELS]
    features = run(engine, np.stack([backbone.preprocess(image) for image in images]))
    engine.close()
    means = features.reshape(4, len(LABELS), -1).mean(axis=0)
    # Nearest mean as a linear layer, without what all classes share: softmax ignores that part.
    squares = (means**2).sum(axis=1)
    weight = (2 * (means - means.mean(axis=0)) / 100).astype(np.float32)
    bias = (-(squares - squares.mean()) / 100).astype(np.float32)
    head = {f"{backbone.classifier}.weight": weight, f"{backbone.classifier}.bias": bias}
    config = {**backbone.config, "num_classes": len(LABELS), "label_names": LABELS}
    config["graft"] = {
        "format_version": 1,
        "fingerprint": backbone.fingerprint,
        "freeze": "backbone",
        "temperature": 1.5,
        "conformal": {"coverage": 0.9, "threshold": 0.5},
        "metrics": {"val": {"accuracy": 1.0}},
        "preprocess": backbone.preprocess.to_dict(),
        "engine": engine.info.to_dict(),
        "head": backbone.classifier,
        "versions": {},
        "weights": backbone.weights,
        "license": backbone.license,
    }

    def copy_engine(path: Path) -> None:
        for suffix in (".xml", ".bin"):
            shutil.copy(backbone.openvino_path.with_suffix(suffix), path.with_suffix(suffix))

    return checkpoints.publish(
        repository,
        name,
        state={**backbone.read_tensors(), **head},
        config=config,
        golden=Golden(tuple(images[:3]), features[:3] @ weight.T + bias),
        write_engine=copy_engine,
        card=lambda version: f"# {name} {version}\n",
    )


def change_file(path: Path, change: Callable[[bytes], bytes], *, rehash: bool) -> None:
    """Change a file of a checkpoint and, with `rehash`, its hash in config.json."""
    path.write_bytes(change(path.read_bytes()))
    if rehash:
        change_config(
            path.parent,
            lambda config: config["graft"]["files"].update(
                {path.name: checkpoints.hash_file(path)}
            ),
        )


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / checkpoints.CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def copy_checkpoint(source: Path, repository: Path, name: str, version: int) -> Path:
    target = repository / name / str(version)
    shutil.copytree(source, target)
    return target


@dataclass(frozen=True)
class RunningServer:
    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextmanager
def serve(
    log_path: Path,
    env: Mapping[str, str],
    *,
    cwd: Path = PROJECT_DIR,
    target: str = ".",
    until: str = "/readyz",
) -> Iterator[RunningServer]:
    """`bentoml serve` on a free port of the loopback; its process group is killed afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bentoml = Path(sys.executable).with_name("bentoml")
    inherited = {name: value for name, value in os.environ.items() if name != "CHECKPOINTS"}
    environment = {**inherited, "BENTOML_DO_NOT_TRACK": "True", "GRAFT_DRAIN_SECONDS": "0.5", **env}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [bentoml, "serve", target, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = RunningServer(f"http://127.0.0.1:{port}", process, log_path)
    try:
        _wait_until(server, until)
        yield server
    finally:
        stop(server)


def stop(server: RunningServer, seconds: float = HANG_SECONDS) -> int:
    """Send SIGTERM to the process, then SIGKILL to the rest of its group; give the exit code."""
    server.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    return server.process.wait(seconds)


def _wait_until(server: RunningServer, path: str, seconds: float = HANG_SECONDS) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(server.url + path, timeout=2).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server did not answer {path} with 200:\n{server.log()}")
