"""The other end of engine_worker: an engine that runs in a process of its own, for one event loop and for who loads models."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.engine.engine import EngineInfo, Features
from models.errors import GraftError
from models.images import Pixels
from models.preprocess import Preprocess
from service.engine.wire import ANSWER, Image, Outcome, _job, _outcome

logger = logging.getLogger("bentoml.graft")

_RECEIVE_BYTES = 1 << 18
_MAX_FDS = 253  # Linux' SCM_MAX_FD
# The pixels of an image are a megabyte, which glibc by itself maps anew, zeroed page by page, for each: 2 % of a request. What the
# environment says of it comes first.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
_ROOT = Path(__file__).resolve().parents[2]

Done = Callable[[Outcome | Exception], None]


@dataclass
class _Slot:
    """A connection to one thread of the worker, which does a job at a time."""

    connection: socket.socket
    num_images: int = 0
    done: Done | None = None
    unsent: deque[memoryview] = field(default_factory=deque)
    received: bytearray = field(default_factory=bytearray)


class EngineProcess:
    """A backbone's engine behind sockets. `start`, `attach` and `close` belong to one event loop, `run` to one other thread at a time."""

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
        """`options` as `models.prepared.build_engine` takes them. Raises GraftError as that does, or where the process ends meanwhile.

        `on_death` is called on the event loop when the process ends without having been asked to.
        """
        self._on_death = on_death
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self.is_dead = False
        control, theirs = socket.socketpair()
        environment = {
            **_MALLOC,
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        }
        with theirs:
            command = [sys.executable, "-m", "service.engine.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self._control = control
        asked = {
            "folder": str(folder.resolve()),
            "preprocess": preprocess.to_dict(),
            "config": dict(config),
            "options": options,
            "max_pixels": max_pixels,
        }
        try:
            control.sendall(json.dumps(asked).encode() + b"\n")
            answer, fds, _, _ = socket.recv_fds(control, 65536, _MAX_FDS)
        except OSError:
            answer, fds = b"", []
        if not answer:
            raise GraftError(
                f"the engine's process ended with {self._process.wait()} while it loaded; the server's log says why"
            )
        loaded = json.loads(answer)
        if "error" in loaded:
            control.close()
            self._process.wait()
            raise GraftError(loaded["error"])
        self.info = EngineInfo(**loaded["info"])
        self.num_features: int = loaded["num_features"]
        self.num_slots: int = loaded["num_slots"]
        first, *others = (socket.socket(fileno=fd) for fd in fds)
        self._for_loading = first
        self._slots = [_Slot(connection) for connection in others]
        self._idle = list(self._slots)

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, crops: Pixels) -> Features:
        """`uint8 [B,H,W,3]` → `float32 [B,F]`, waiting for the answer. Raises GraftError where there is none."""
        job = _job(list(crops))
        try:
            self._for_loading.sendall(b"".join(job))
            answer = self._receive(
                self._for_loading, ANSWER.unpack(self._receive(self._for_loading, ANSWER.size))[0]
            )
        except (OSError, EOFError) as error:
            raise GraftError("the engine's process has ended; the server's log says why") from error
        results = _outcome(memoryview(answer), len(crops)).results
        for result in results:
            if isinstance(result, Exception):
                raise GraftError(str(result))
        return np.stack([result for result in results if not isinstance(result, Exception)])

    def attach(self) -> None:
        """Hear from the process on the running event loop."""
        loop = asyncio.get_running_loop()
        if self._loop is loop or self._is_closed or self.is_dead:
            return
        self._loop = loop
        for slot in self._slots:
            slot.connection.setblocking(False)
            loop.add_reader(slot.connection.fileno(), self._read, slot)

    def start(self, images: Sequence[Image], done: Done) -> None:
        """Run a batch, with no more than `num_slots` in flight; `done` is called on the event loop, later."""
        self.attach()
        if not self._idle:
            raise RuntimeError("the engine's process has ended")
        slot = self._idle.pop()
        slot.done, slot.num_images = done, len(images)
        slot.unsent.extend(memoryview(part) for part in _job(images))
        self._write(slot)

    def close(self) -> None:
        """Let go of the process, which then ends; nothing may be in flight."""
        if self._is_closed:
            return
        self._is_closed = True
        for slot in self._slots:
            self._let_go(slot)
        self._for_loading.close()
        self._control.close()
        # Its end is waited for by nobody but the system, which wants to be asked.
        threading.Thread(target=self._process.wait, daemon=True).start()

    def _let_go(self, slot: _Slot) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(slot.connection.fileno())
            self._loop.remove_writer(slot.connection.fileno())
        slot.connection.close()

    def _write(self, slot: _Slot) -> None:
        assert self._loop is not None
        try:
            sent = slot.connection.sendmsg(slot.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the reader hears of it, too
        while slot.unsent and sent >= len(slot.unsent[0]):
            sent -= len(slot.unsent.popleft())
        if slot.unsent:
            slot.unsent[0] = slot.unsent[0][sent:]
            self._loop.add_writer(slot.connection.fileno(), self._write_more, slot)

    def _write_more(self, slot: _Slot) -> None:
        assert self._loop is not None
        self._loop.remove_writer(slot.connection.fileno())
        self._write(slot)

    def _read(self, slot: _Slot) -> None:
        try:
            received = slot.connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._die()
            return
        slot.received += received
        if (
            len(slot.received) < ANSWER.size
            or len(slot.received) < ANSWER.size + ANSWER.unpack_from(slot.received)[0]
        ):
            return
        # A copy of its own: the features are views of it.
        answer = memoryview(bytes(slot.received))[ANSWER.size :]
        slot.received.clear()
        done, slot.done = slot.done, None
        self._idle.append(slot)
        assert done is not None
        done(_outcome(answer, slot.num_images))

    def _die(self) -> None:
        """The process is gone, and nobody had asked it to: what is in flight fails, and so will all that comes."""
        if self._is_closed or self.is_dead:
            return
        self.is_dead = True
        self._idle.clear()
        for slot in self._slots:
            self._let_go(slot)
        logger.error(
            "the engine's process %d has ended (%s), and nobody had asked it to",
            self._process.pid,
            self._process.poll(),
        )
        failed = [slot.done for slot in self._slots if slot.done is not None]
        for slot in self._slots:
            slot.done = None
        for done in failed:
            done(RuntimeError("the engine's process has ended"))
        self._on_death()

    @staticmethod
    def _receive(connection: socket.socket, num_bytes: int) -> bytes:
        received = b""
        while len(received) < num_bytes:
            part = connection.recv(num_bytes - len(received))
            if not part:
                raise EOFError
            received += part
        return received
