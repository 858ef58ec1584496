"""A real server whose parent or worker is killed: neither is left alone, and no port is held.

Orderly ends stay orderly.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx
import psutil

from tests.support.servers import PROJECT_DIR, RunningServer, serve
from tests.support.shared import HANG_SECONDS


def test_a_killed_worker_is_replaced_and_the_server_serves_again(tmp_path: Path) -> None:
    with start(tmp_path) as server:
        killed = worker_of(server)
        killed.kill()
        worker_of(server, other_than=killed)
        # The port stays open meanwhile: who connects now waits for the new worker.
        assert httpx.get(f"{server.url}/livez", timeout=HANG_SECONDS).status_code == 200
        assert f"process {killed.pid}, ended with -9" in server.log()
        server.process.terminate()
        assert server.process.wait(HANG_SECONDS) == 0


def test_in_a_container_the_server_ends_with_its_worker_so_that_the_orchestrator_acts(
    tmp_path: Path,
) -> None:
    with start(tmp_path, in_container=True) as server:
        killed = worker_of(server)
        killed.kill()
        assert server.process.wait(5) == 1
        assert f"process {killed.pid}, ended with -9" in server.log()


def test_a_worker_that_is_half_dead_is_waited_for() -> None:
    # Its first thread is gone, and another lives longer than the parent waits between two checks.
    half_dead = (
        "import ctypes, threading, time; threading.Timer(2.5, print).start(); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    ended = run_parent(half_dead, "lifeline.watch_worker()")
    assert "ended with 0 and was not asked to; the server ends" in ended.stderr
    assert "No active process found for watcher" in ended.stderr


def test_the_private_interfaces_that_the_parent_uses_are_there() -> None:
    """Of circus, which starts BentoML's worker; `service.lifeline` reads and replaces them."""
    inspect = """
import json, signal
from tornado.ioloop import IOLoop, PeriodicCallback

def inspect():
    from circus.process import DEAD_OR_ZOMBIE, UNEXISTING
    handler = signal.getsignal(signal.SIGTERM)
    IOLoop.current().call_later(0.1, signal.raise_signal, signal.SIGTERM)
    timer = arbiter.ctrl.caller
    (watcher,) = arbiter.watchers
    (process,) = watcher.processes.values()
    print(json.dumps({
        "arbiter": handler.__self__.controller.arbiter is arbiter,
        "timer": isinstance(timer, PeriodicCallback),
        "timer.callback": timer.callback.__name__,
        "timer.callback_time": timer.callback_time,
        "watcher.hooks": type(watcher.hooks).__name__,
        "watcher.reap_process": callable(watcher.reap_process),
        "watcher.is_stopping": watcher.is_stopping(),
        "watcher.numprocesses": watcher.numprocesses,
        "watcher.respawn": watcher.respawn,
        "process.pid": type(process.pid).__name__,
        "process.status": process.status not in (DEAD_OR_ZOMBIE, UNEXISTING),
    }), flush=True)

IOLoop.current().call_later(1, inspect)
"""
    ended = run_parent("import time; time.sleep(60)", inspect)
    assert json.loads(ended.stdout) == {
        "arbiter": True,
        "timer": True,
        "timer.callback": "manage_watchers",
        "timer.callback_time": 10_000,
        "watcher.hooks": "dict",
        "watcher.reap_process": True,
        "watcher.is_stopping": False,
        "watcher.numprocesses": 1,
        "watcher.respawn": False,
        "process.pid": "int",
        "process.status": True,
    }, ended.stderr


def test_an_orderly_end_is_not_a_death(tmp_path: Path) -> None:
    # The worker takes longer than the parent waits between two checks.
    with start(tmp_path, in_container=True, drain_seconds=1.5) as server:
        server.process.terminate()
        assert server.process.wait(HANG_SECONDS) == 0
        assert "was not asked to" not in server.log()


def test_a_worker_ends_with_its_parent_and_frees_the_port(tmp_path: Path) -> None:
    with start(tmp_path) as server:
        worker = worker_of(server)
        server.process.kill()
        wait_until(lambda: is_gone(worker), seconds=5)
        assert "this worker answers its open requests and ends" in server.log()
        # As on SIGTERM, its engines closed, and not by force.
        assert "Completed async cleanup hook" in server.log()
        assert is_refused(server)


def test_a_worker_whose_parent_died_before_it_was_up_ends_too(tmp_path: Path) -> None:
    with start(tmp_path) as server:
        first = worker_of(server)
        first.kill()
        second = worker_of(server, other_than=first)
        server.process.kill()
        # What it takes to start comes first.
        wait_until(lambda: is_gone(second), seconds=20)
        assert is_refused(server)


def run_parent(worker: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run circus with one worker, as BentoML does, and `code` before it starts it."""
    parent = f"""
import sys
from circus import get_arbiter
from service import lifeline
worker = {{"name": "worker", "cmd": sys.executable, "args": ["-c", sys.argv[1]], "respawn": False}}
arbiter = get_arbiter([worker], check_delay=10)
{code}
arbiter.start()
"""
    return subprocess.run(
        [sys.executable, "-c", parent, worker],
        cwd=PROJECT_DIR,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def start(
    folder: Path, *, in_container: bool = False, drain_seconds: float = 0.1
) -> AbstractContextManager[RunningServer]:
    """A server without a model: it is up in seconds, and lives and dies as one with models does."""
    env = {"CHECKPOINTS": str(folder / "none"), "GRAFT_DRAIN_SECONDS": str(drain_seconds)}
    if in_container:
        # What BentoML's Dockerfile sets, and all that BentoML looks at.
        env["BENTOML_CONTAINERIZED"] = "true"
    return serve(folder / "log", env, until="/livez")


def worker_of(server: RunningServer, *, other_than: psutil.Process | None = None) -> psutil.Process:
    """The worker, which has to be there within 5 s."""

    def workers() -> list[psutil.Process]:
        children = psutil.Process(server.process.pid).children()
        return [child for child in children if child != other_than and not is_gone(child)]

    wait_until(lambda: len(workers()) == 1, seconds=5)
    return workers()[0]


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, also where nobody reaps it: an orphan in a container without init."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def is_refused(server: RunningServer) -> bool:
    try:
        httpx.get(f"{server.url}/livez", timeout=1)
    except httpx.ConnectError:
        return True
    return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.05)
