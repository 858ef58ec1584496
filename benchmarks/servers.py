"""A server as a process group of its own: started on a free port, waited for, and always ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.process import tree

ROOT = Path(__file__).resolve().parent.parent
_PORTS = itertools.cycle(range(4100, 4200))
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Launch:
    """`{port}` in the command becomes the port; `ready_path` answers 200 once it serves."""

    command: tuple[str, ...]
    ready_path: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """A server that runs, and how long it took until it was ready."""

    port: int
    pid: int
    start_seconds: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serve(launch: Launch, log_path: Path) -> Iterator[Server]:
    """Run the server within the context.

    Raises RuntimeError with the end of its log if it does not become ready.
    """
    port = next(port for port in _PORTS if _is_free(port))
    command = [part.format(port=port) for part in launch.command]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        **launch.environment,
    }
    started = time.perf_counter()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}{launch.ready_path}"
        while not _answers(url):
            if process.poll() is not None or time.perf_counter() - started > _START_SECONDS:
                end = log_path.read_text(errors="replace")[-3000:]
                seconds = time.perf_counter() - started
                raise RuntimeError(
                    f"{' '.join(command)} was not ready after {seconds:.0f} s:\n{end}"
                )
            time.sleep(_POLL_SECONDS)
        yield Server(port, process.pid, time.perf_counter() - started)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process, as an orchestrator sends it, then SIGKILL to all descendants left."""
    # BentoML's workers have process groups of their own, so the group alone would miss them.
    family = tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
