"""No half of a server outlives the other: neither the worker, nor the parent that BentoML puts before it.

`bentoml serve` is two processes: a parent that holds the port and looks after its worker (circus does, for BentoML), and the
worker, which is all the rest of this package. Left alone (bentoml 1.4.39), they part badly when one is killed or crashes:

- The parent looks after a dead worker every 10 s: outside of a container it starts another, in one (`BENTOML_CONTAINERIZED`, set
  by BentoML's Dockerfile) it ends with 1, for the orchestrator to act, with its restart policy and its back-off. Both are right
  and an orderly stop is told apart, so `watch_worker` only has it look more often, and say what it saw.
- A worker does not look after its parent at all: it would hold the port, unsupervised, for ever. `follow_parent` ends it as
  SIGTERM does, so what is in is finished. It asks for the parent's number and not for a signal at its death (Linux' PDEATHSIG),
  which comes when the thread that started the worker ends, and never if the parent died first.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

logger = logging.getLogger("bentoml.graft")

_SECONDS_BETWEEN_LOOKS = 1.0
_PARENT = "GRAFT_PARENT_PID"


def watch_worker() -> None:
    """In the parent, before it starts its worker: notice a dead worker within a second or two."""
    # The worker has no need of it.
    from tornado.ioloop import IOLoop

    os.environ[_PARENT] = str(os.getpid())
    IOLoop.current().add_callback(_watch_worker)


def follow_parent() -> None:
    """In the worker: end as on SIGTERM once the parent is gone."""
    parent = os.environ.get(_PARENT)
    if parent is not None:
        threading.Thread(target=_follow, args=(int(parent),), name="lifeline", daemon=True).start()


def _watch_worker() -> None:
    # BentoML has neither an option for the interval nor a way to its arbiter; the handler of signals leads there.
    handler: Any = signal.getsignal(signal.SIGTERM)
    arbiter = handler.__self__.controller.arbiter
    for watcher in arbiter.watchers:
        watcher.hooks["after_reap"] = _log_death
    looking = arbiter.ctrl.caller
    look_after_workers = looking.callback

    def look() -> Any:
        for watcher in arbiter.watchers:
            _reap_dead(watcher)
        # Only then, so that it meets no worker that died since.
        if any(len(watcher.processes) < watcher.numprocesses for watcher in arbiter.watchers):
            return look_after_workers()
        return None

    looking.stop()
    looking.callback = look
    looking.callback_time = 1000 * _SECONDS_BETWEEN_LOOKS
    looking.start()


def _reap_dead(watcher: Any) -> None:
    """Call the hooks of each dead worker, whose exit code is waited for.

    Left alone, circus (0.19) takes a worker whose first thread is dead for one that is gone, with no word and no exit code, while
    the kernel still ends the other threads: with dozens of them, on a machine with few cores, that takes its time.
    """
    from circus.process import DEAD_OR_ZOMBIE, UNEXISTING

    for process in list(watcher.processes.values()):
        if process.status in (DEAD_OR_ZOMBIE, UNEXISTING):
            watcher.reap_process(process.pid)


def _log_death(watcher: Any, process_pid: int, exit_code: int | None, **_: object) -> None:
    if not watcher.is_stopping():
        then = (
            "another one is started"
            if watcher.respawn
            else "the server ends, so that it is started again"
        )
        logger.error(
            "the worker, process %d, ended with %s and nobody had asked it to; %s",
            process_pid,
            exit_code,
            then,
        )


def _follow(parent: int) -> None:
    # Who adopts an orphan has another number, also where the parent is a container's first process.
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    logger.error(
        "the parent, process %d, is gone; this worker finishes what it has and ends", parent
    )
    os.kill(os.getpid(), signal.SIGTERM)
