"""What every test gets: temporary homes, no network beyond the loopback, and parts that take seconds to make, made once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.engine.openvino_engine import OpenVINOEngine
from models.prepared import PreparedBackbone, prepare_backbone
from models.preprocess import Pixels
from tests.support.servers import RunningServer, publish_colors

# What is started in the background ignores Ctrl-C, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Set before the tests are imported: the hub's client reads its own variables at import. Subprocesses inherit all of it.
_HOME = tempfile.TemporaryDirectory(prefix="graft-tests-")
os.environ.update(
    HOME=_HOME.name,
    XDG_CACHE_HOME=f"{_HOME.name}/.cache",
    XDG_CONFIG_HOME=f"{_HOME.name}/.config",
    HF_HOME=f"{_HOME.name}/huggingface",
    HF_HUB_OFFLINE="1",
    # A proxy that is not there: whatever looks beyond the loopback fails at once.
    http_proxy="http://127.0.0.1:9",
    https_proxy="http://127.0.0.1:9",
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    no_proxy="127.0.0.1,localhost",
    NO_PROXY="127.0.0.1,localhost",
)
for _name in (
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_CACHE",
    "TORCH_HOME",
    "ALL_PROXY",
    "all_proxy",
):
    os.environ.pop(_name, None)

PROJECT_DIR = Path(__file__).resolve().parent.parent

_FORKER = """
import json, os, signal, sys, traceback
import torch, torchvision
for line in sys.stdin:
    pids = []
    for job in json.loads(line):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # nothing here may take so long; its end is then -14
            os.environ.update(job["env"])
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                exec(job["code"], {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a file of networks so small that several threads slow torch down."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session", autouse=True)
def _loopback_only() -> Iterator[None]:
    """A test of this process that connects to anything but the loopback fails, in words."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test looked for the network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The default of `--cache-dir` under the tests' home, so that everything converted is shared."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "graft"


@pytest.fixture(scope="session")
def prepared(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBackbone:
    """The embedded backbone with its ImageNet weights, converted once a session."""
    return prepare_backbone(
        "tf_efficientnet_lite0",
        weights=None,
        pretrained=True,
        image_size=None,
        cache_dir=cache_dir,
        scratch_dir=tmp_path_factory.mktemp("scratch"),
    )


@pytest.fixture(scope="session")
def engine(prepared: PreparedBackbone) -> Iterator[OpenVINOEngine]:
    """The embedded backbone in fp32, four images a batch, two streams: so that batches are padded and overtake one another."""
    engine = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, precision="fp32", batch_size=4, num_streams=2
    )
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def crops() -> Pixels:
    """Ten different crops `uint8 [10,224,224,3]`."""
    coarse = np.random.default_rng(7).integers(0, 256, (10, 14, 14, 3), np.uint8)
    return coarse.repeat(16, axis=1).repeat(16, axis=2)


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint that tells three colours apart; to be copied into a repository of the test's own: exporting takes seconds."""
    return publish_colors(tmp_path_factory.mktemp("published") / "checkpoints")


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """Of the server that the test's own module starts."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run a program in a fresh interpreter from the project's root."""

    def run(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=PROJECT_DIR,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


RunForked = Callable[[list[tuple[str, dict[str, str]]]], list[tuple[int, str]]]


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunForked]:
    """Run programs at once, each with its environment, in processes that have torch and nothing more: importing it takes seconds.

    Gives each one's exit code and what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKER],
        cwd=PROJECT_DIR,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(jobs: list[tuple[str, dict[str, str]]]) -> list[tuple[int, str]]:
        folder = tmp_path_factory.mktemp("forked")
        outputs = [folder / str(index) for index in range(len(jobs))]
        request = [
            {"code": code, "env": env, "output": str(output)}
            for (code, env), output in zip(jobs, outputs, strict=True)
        ]
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline())
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]

    yield run
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
