"""What every test gets: a temporary home, no network but the loopback, costly parts made once."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.engine import openvino_engine
from models.engine.openvino_engine import OpenVINOEngine
from models.images import Pixels
from models.prepared import PreparedBackbone, prepare_backbone
from tests.support.forked import IMPORTED_BY_A_RUN, Forker
from tests.support.servers import RunningServer, publish_colors
from tests.support.shared import HANG_SECONDS, locked, machine, make_once

# A shell's background jobs ignore Ctrl-C, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests start a hundred processes, and without bytecode each would compile the project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Looking for cycles in what is imported, and stays, takes a tenth of the imports' time.
gc.disable()
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
    # Reading the world's certificates is 50 ms of each of a thousand clients, which use none.
    SSL_CERT_DIR=os.environ["HOME"],
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
SMALL_SIZE = 96


@pytest.fixture(autouse=True)
def _levels_of_logging() -> None:
    """A program that ran in this process, in a test before, has set levels or disabled loggers."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("graft").setLevel(logging.NOTSET)
    # BentoML's server, started in this process, disables the loggers that are there already.
    for name, known in logging.root.manager.loggerDict.items():
        if name.startswith("graft") and isinstance(known, logging.Logger):
            known.disabled = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no process is left with one at the end.

    End with those that are alone, for which the others wait; where they have their file's server,
    starting it anew would take longer.
    """
    items.sort(
        key=lambda item: (
            item.get_closest_marker("alone") is not None
            and "server" not in getattr(item, "fixturenames", ()),
            item.get_closest_marker("long") is None,
        )
    )


def pytest_collection_finish() -> None:
    """All is imported: from here on only what tests make is looked through for cycles."""
    gc.freeze()
    gc.enable()


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
def _short_search() -> Iterator[None]:
    """An engine's search for its fastest batch: a batch or two of each size, not 0.7 s.

    No result depends on the batch.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_engine, "_ROUND_SECONDS", 0.01)
        yield


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


def _prepare(
    image_size: int | None, cache_dir: Path, scratch_dir: Path, *, all_levels: bool = False
) -> PreparedBackbone:
    with locked("embedded backbone"):
        return prepare_backbone(
            "tf_efficientnet_lite0",
            weights=None,
            pretrained=True,
            image_size=image_size,
            cache_dir=cache_dir,
            scratch_dir=scratch_dir,
            all_levels=all_levels,
        )


@pytest.fixture(scope="session")
def prepared(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBackbone:
    """The embedded backbone with its ImageNet weights, converted once."""
    return _prepare(None, cache_dir, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def small_prepared(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBackbone:
    """The same for images of `SMALL_SIZE`, a fifth of the work: where hundreds go through it."""
    return _prepare(SMALL_SIZE, cache_dir, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def small_levels_prepared(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreparedBackbone:
    """The same with the features of all levels, as runs prepare it."""
    return _prepare(SMALL_SIZE, cache_dir, tmp_path_factory.mktemp("scratch"), all_levels=True)


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
    with httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
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


RunForked = Callable[..., "list[subprocess.CompletedProcess[str]]"]


@contextlib.contextmanager
def _forking(
    modules: Sequence[str], env: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunForked]:
    forker = Forker(modules, env)
    yield lambda *programs: forker.run(programs, tmp_path_factory.mktemp("forked"))
    forker.close()


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunForked]:
    """Run `Program`s at once, forked from a process that has imported what a run imports."""
    with _forking(IMPORTED_BY_A_RUN, os.environ, tmp_path_factory) as run:
        yield run


@pytest.fixture(scope="session")
def run_forked_online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunForked]:
    """As `run_forked`, but only torch is imported, and a hub may be asked (on the loopback)."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with _forking(("torch", "torchvision"), env, tmp_path_factory) as run:
        yield run
