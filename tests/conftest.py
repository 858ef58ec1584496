"""What every test gets: a temporary home, no network but the loopback, costly parts made once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.engine.openvino_engine import OpenVINOEngine
from models.images import Pixels
from models.prepared import PreparedBackbone, prepare_backbone
from tests.support.servers import RunningServer, publish_colors
from tests.support.shared import HANG_SECONDS, locked, machine, make_once

# A shell's background jobs ignore Ctrl-C, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest-xdist's workers inherit the home of the process that started them, and share what is in it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _HOME = tempfile.TemporaryDirectory(prefix="graft-tests-")
    os.environ["HOME"] = _HOME.name
# Set before the tests are imported, since the hub's client reads its variables at import.
os.environ.update(
    XDG_CACHE_HOME=f"{os.environ['HOME']}/.cache",
    XDG_CONFIG_HOME=f"{os.environ['HOME']}/.config",
    HF_HOME=f"{os.environ['HOME']}/huggingface",
    HF_HUB_OFFLINE="1",
    # No proxy listens there: a request beyond the loopback fails at once.
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
            signal.alarm(600)  # ends what hangs, with -14
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
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked `alone` wait for the other processes' tests, and them for it."""
    with machine(alone=item.get_closest_marker("alone") is not None):
        return (yield)


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
    """A test that connects to anything but the loopback fails, with the address."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test connects to {address}; only the loopback is allowed")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The default of `--cache-dir` in the tests' home, so that everything converted is shared."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "graft"


@pytest.fixture(scope="session")
def prepared(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBackbone:
    """The embedded backbone with its ImageNet weights, converted once."""
    with locked("embedded backbone"):
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
    """The embedded backbone in fp32; its small batches are padded and overtake one another."""
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
def colors(prepared: PreparedBackbone) -> Path:
    """A published checkpoint of three colours, to be copied into a repository of the test's own."""
    folder = make_once("colors", lambda folder: publish_colors(folder / "checkpoints"))
    return folder / "checkpoints" / "colors" / "1"


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the server that the test's own module starts."""
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
            timeout=HANG_SECONDS,
        )

    return run


RunForked = Callable[[list[tuple[str, dict[str, str]]]], list[tuple[int, str]]]


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunForked]:
    """Run programs at once, each with its own environment; gives exit codes and outputs.

    They are forked from a process that has imported torch, which takes seconds.
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
    requests, answers = process.stdin, process.stdout
    assert requests is not None
    assert answers is not None

    def run(jobs: list[tuple[str, dict[str, str]]]) -> list[tuple[int, str]]:
        folder = tmp_path_factory.mktemp("forked")
        outputs = [folder / str(index) for index in range(len(jobs))]
        request = [
            {"code": code, "env": env, "output": str(output)}
            for (code, env), output in zip(jobs, outputs, strict=True)
        ]
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        codes = json.loads(answers.readline())
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]

    yield run
    requests.close()
    process.wait(HANG_SECONDS)
    answers.close()
