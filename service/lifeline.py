"""Neither process of a server outlives the other: the worker, and the parent that BentoML starts.

`bentoml serve` is two processes: a parent that holds the port and supervises its worker (circus
does, for BentoML), and the worker, which runs the rest of this package. By themselves (bentoml
1.4.39) they handle the death of the other badly:

- The parent checks its worker every 10 s. Outside of a container it starts another one; in a
  container (`BENTOML_CONTAINERIZED`, set by BentoML's Dockerfile) it exits with 1, so that the
  orchestrator restarts it by its own policy and back-off. Both are right, and an orderly stop is
  told apart. `watch_worker` only has it check every second, and log what it found.
- A worker does not check its parent at all: it would hold the port, unsupervised, for ever.
  `follow_parent` ends it as SIGTERM does, so that open requests are answered. It compares the
  parent's process id. Linux' signal at a parent's death (PDEATHSIG) comes already when the thread
  ends that started the worker, and never if the parent died first.

Private interfaces, because bentoml 1.4.39 and circus 0.19 have neither an option for the interval
nor a hook for a dead worker: all that `_watch_worker`, `_reap_dead` and `_log_death` read and
replace. tests/service/test_lifeline.py names each one, and fails when it changes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

logger = logging.getLogger("bentoml.graft")

_CHECK_SECONDS = 1.0
_PARENT_VARIABLE = "GRAFT_PARENT_PID"


def watch_worker() -> None:
    """In the parent, before it starts its worker: notice a dead worker within a second or two."""
    # Imported here, because the worker has no use for it.
    from tornado.ioloop import IOLoop

    os.environ[_PARENT_VARIABLE] = str(os.getpid())
    IOLoop.current().add_callback(_watch_worker)


def follow_parent() -> None:
    """In the worker: end as on SIGTERM once the parent is gone."""
    parent = os.environ.get(_PARENT_VARIABLE)
    if parent is not None:
        threading.Thread(target=_follow, args=(int(parent),), name="lifeline", daemon=True).start()


def _watch_worker() -> None:
    # The handler of signals is the one way to BentoML's arbiter.
    handler: Any = signal.getsignal(signal.SIGTERM)
    arbiter = handler.__self__.controller.arbiter
    for watcher in arbiter.watchers:
        watcher.hooks["after_reap"] = _log_death
    timer = arbiter.ctrl.caller
    manage_watchers = timer.callback

    def check() -> Any:
        for watcher in arbiter.watchers:
            _reap_dead(watcher)
        # Only where one is missing: circus itself would miss the exit code of one that died since.
        if any(len(watcher.processes) < watcher.numprocesses for watcher in arbiter.watchers):
            return manage_watchers()
        return None

    timer.stop()
    timer.callback = check
    timer.callback_time = 1000 * _CHECK_SECONDS
    timer.start()


def _reap_dead(watcher: Any) -> None:
    """Reap each dead worker: wait for its exit code and call the hooks.

    circus (0.19) by itself takes a worker whose first thread is dead for one that is gone, without
    a log line or an exit code, while the kernel still ends the other threads: with dozens of them,
    on a machine with few cores, that takes its time.
    """
    from circus.process import DEAD_OR_ZOMBIE, UNEXISTING

    for process in list(watcher.processes.values()):
        if process.status in (DEAD_OR_ZOMBIE, UNEXISTING):
            watcher.reap_process(process.pid)


def _log_death(watcher: Any, process_pid: int, exit_code: int | None, **_: object) -> None:
    if not watcher.is_stopping():
        consequence = (
            "another one is started"
            if watcher.respawn
            else "the server ends, so that it is started again"
        )
        logger.error(
            "the worker, process %d, ended with %s and was not asked to; %s",
            process_pid,
            exit_code,
            consequence,
        )


def _follow(parent: int) -> None:
    # An orphan's new parent has another id, also where the old one is a container's first process.
    while os.getppid() == parent:
        time.sleep(_CHECK_SECONDS)
    logger.error(
        "the parent, process %d, is gone; this worker answers its open requests and ends", parent
    )
    os.kill(os.getpid(), signal.SIGTERM)
