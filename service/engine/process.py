"""An engine that runs in a process of its own (`worker.py`), as one event loop sees it."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.engine.engine import EngineInfo, Features
from models.errors import GraftError
from models.images import Pixels
from models.preprocess import Preprocess
from service.engine.wire import Channel, Image, Outcome, pack_job, unpack_outcome

logger = logging.getLogger("bentoml.graft")

_MAX_FDS = 253  # Linux' SCM_MAX_FD
# By default glibc maps and zeroes new memory for each image's pixels (1 MB), 2 % of a request. The
# environment goes before these.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
_ROOT = Path(__file__).resolve().parents[2]
_ENDED = "the engine's process has ended"

Done = Callable[[Outcome | Exception], None]


class EngineDiedError(GraftError):
    """The engine's process ended unasked: killed, or out of memory."""


@dataclass
class _Slot:
    """A channel that carries one batch at a time."""

    channel: Channel
    done: Done | None = None
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))


class EngineProcess:
    """A backbone's engine in a process of its own.

    `start`, `attach` and `close` are for one event loop, `run` for one other thread at a time.
    """

    def __init__(
        self,
        folder: Path,
        preprocess: Preprocess,
        config: Mapping[str, Any],
        *,
        max_pixels: int,
        on_death: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """`options` are those of `models.prepared.build_engine`.

        `on_death` is called on the event loop when the process ends unasked. Raises GraftError as
        `build_engine` does, EngineDiedError where the process ends meanwhile, and OSError.
        """
        self._on_death = on_death
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self.is_dead = False
        self._process, self._control = _start_process()
        request = {
            "folder": str(folder.resolve()),
            "preprocess": preprocess.to_dict(),
            "config": dict(config),
            "options": options,
            "max_pixels": max_pixels,
        }
        loaded, fds = self._load(request)
        self.info = EngineInfo(**loaded["info"])
        self.num_features: int = loaded["num_features"]
        self.num_slots: int = loaded["num_slots"]
        self._for_loading, *channels = (Channel(socket.socket(fileno=fd)) for fd in fds)
        self._slots = [_Slot(channel) for channel in channels]
        self._idle = list(self._slots)

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, crops: Pixels) -> Features:
        """`uint8 [B,H,W,3]` → `float32 [B,F]`, blocking.

        Raises GraftError where that fails, EngineDiedError where the process has ended.
        """
        try:
            self._for_loading.send(pack_job(list(crops)))
            results = unpack_outcome(self._for_loading.receive()).results
        except (OSError, EOFError) as error:
            raise EngineDiedError(f"{_ENDED}; the server's log says why") from error
        features = []
        for result in results:
            if isinstance(result, Exception):
                raise GraftError(str(result))
            features.append(result)
        return np.stack(features)

    def attach(self) -> None:
        """Receive the answers, and notice the end of the process, on the running event loop."""
        loop = asyncio.get_running_loop()
        if self._loop is loop or self._is_closed or self.is_dead:
            return
        self._loop = loop
        for slot in self._slots:
            slot.channel.connection.setblocking(False)
            loop.add_reader(slot.channel.fileno(), self._read, slot)

    def start(self, images: Sequence[Image], done: Done) -> None:
        """Run a batch, at most `num_slots` at once; `done` is called on the event loop, later."""
        self.attach()
        if not self._idle:
            raise RuntimeError(_ENDED)
        slot = self._idle.pop()
        slot.done, slot.unsent = done, memoryview(pack_job(images))
        self._write(slot)

    def close(self) -> None:
        """End the process; nothing may be in flight."""
        if self._is_closed:
            return
        self._is_closed = True
        self._close_slots()
        self._for_loading.close()
        self._control.close()
        # Reaps the process, whenever it ends.
        threading.Thread(target=self._process.wait, daemon=True).start()

    def _load(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """What was loaded, and the file descriptors of the connections."""
        try:
            self._control.sendall(json.dumps(request).encode() + b"\n")
            answer, fds, _, _ = socket.recv_fds(self._control, 65536, _MAX_FDS)
        except OSError:
            answer, fds = b"", []
        if not answer:
            self._control.close()
            raise EngineDiedError(
                f"the engine's process ended with {self._process.wait()} while it loaded; "
                "the server's log says why"
            )
        loaded: dict[str, Any] = json.loads(answer)
        if "error" in loaded:
            self._control.close()
            self._process.wait()
            raise GraftError(loaded["error"])
        # Linux leaves out those for which this process has no room.
        if len(fds) <= loaded["num_slots"]:
            for fd in fds:
                os.close(fd)
            self._control.close()
            self._process.wait()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return loaded, fds

    def _write(self, slot: _Slot) -> None:
        """Write what the socket takes now, and the rest when it takes more."""
        assert self._loop is not None
        try:
            num_sent = slot.channel.connection.send(slot.unsent)
        except BlockingIOError:
            num_sent = 0
        except OSError:
            return  # The reader notices the end of the process too.
        slot.unsent = slot.unsent[num_sent:]
        if slot.unsent:
            self._loop.add_writer(slot.channel.fileno(), self._write, slot)
        else:
            self._loop.remove_writer(slot.channel.fileno())

    def _read(self, slot: _Slot) -> None:
        try:
            message = slot.channel.receive_part()
        except BlockingIOError:
            return
        except (EOFError, OSError):
            self._die()
            return
        if message is None:
            return
        done, slot.done = slot.done, None
        self._idle.append(slot)
        assert done is not None, "an answer to no job"
        done(unpack_outcome(message))

    def _die(self) -> None:
        """The process ended unasked: batches in flight and all that follow fail."""
        if self._is_closed or self.is_dead:
            return
        self.is_dead = True
        self._idle.clear()
        self._close_slots()
        logger.error(
            "the engine's process %d has ended (%s) without having been asked to",
            self._process.pid,
            self._process.poll(),
        )
        in_flight = [slot.done for slot in self._slots if slot.done is not None]
        for slot in self._slots:
            slot.done = None
        for done in in_flight:
            done(RuntimeError(_ENDED))
        self._on_death()

    def _close_slots(self) -> None:
        for slot in self._slots:
            # Closed already, if the process died before it was closed.
            if slot.channel.fileno() < 0:
                continue
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(slot.channel.fileno())
                self._loop.remove_writer(slot.channel.fileno())
            slot.channel.close()


def _start_process() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The worker, and the socket to it."""
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.engine.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**_MALLOC, **os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
    return process, ours
