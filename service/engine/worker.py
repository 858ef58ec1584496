"""A backbone's engine in a process of its own: encoded images in, features out. `EngineProcess` starts it.

    python -m service.engine.worker FD

Decoding, the engine and HTTP in one process share Python's lock, and each waits for it: with the engine out of the way the service
answers 12 % more requests on two cores, and what crashes the engine cannot take the answers with it.

FD is a socket. On it comes what to load, as a line of JSON; back goes what was loaded or why not, with a socket for each batch that may be
in flight. As many threads as compute at once then do what comes on any of them. When the other end is closed, by whatever happened
there, this process ends.

    job     images u32, bytes u64; for each image: what it is u8 (0 encoded, 1 the crop itself), bytes u32; then all of them
    answer  bytes u32; then the engine's seconds f64, for each image: what it is u8 (0 features `float32 [F]`, else why there are
            none: 1 unreadable, 2 too large, 3 the engine failed), seconds to decode f64, bytes u32; then all of them
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from models.engine.engine import Engine, Features
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.processor import num_cpus
from models.errors import GraftError
from models.images import ImageError, Pixels
from models.prepared import build_engine
from models.preprocess import Preprocess
from service.engine.wire import (
    ANSWER,
    ANSWER_IMAGE,
    ANSWER_SECONDS,
    CROP,
    JOB,
    JOB_IMAGE,
    _pack,
    _receive,
)

_JOB_BUFFER_BYTES = 1 << 20

logger = logging.getLogger("graft.engine")


@dataclass(frozen=True)
class _Decoded:
    crop: Pixels | Exception
    seconds: float


class _Worker:
    """As many threads as compute at once, each of which takes the next job from whichever socket has one, and so never sleeps while
    there is work: a thread a socket had two of five waiting on one core while the other was idle."""

    def __init__(
        self,
        engine: Engine,
        preprocess: Preprocess,
        max_pixels: int,
        connections: Sequence[socket.socket],
    ) -> None:
        self._engine = engine
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self.num_threads = (
            engine.info.num_streams if isinstance(engine, OpenVINOEngine) else len(connections)
        )
        # Where those threads alone would leave cores idle while they decode (a GPU has two), a batch is decoded by as many.
        has_idle_cores = engine.info.batch_size > 1 and self.num_threads < num_cpus()
        self._decoders = (
            ThreadPoolExecutor(num_cpus(), thread_name_prefix="decode") if has_idle_cores else None
        )
        # An entry for each job under way: a list, because its length changes in one step.
        self._jobs: list[None] = []
        self._waiting = selectors.DefaultSelector()
        self._one_selects = threading.Lock()
        for connection in connections:
            self._waiting.register(connection, selectors.EVENT_READ)

    def serve(self) -> None:
        """Do what comes, until a connection's other end is closed, and end the process then."""
        try:
            while True:
                connection = self._next()
                num_images, num_bytes = JOB.unpack(_receive(connection, JOB.size))
                job = _receive(connection, num_images * JOB_IMAGE.size + num_bytes)
                self._jobs.append(None)
                answer = self._answer(num_images, job)
                self._jobs.pop()
                connection.sendall(answer)
                self._waiting.register(connection, selectors.EVENT_READ)
        except (EOFError, OSError):
            os._exit(0)

    def _next(self) -> socket.socket:
        """A connection with a job, which is this thread's alone until it is registered again."""
        with self._one_selects:
            while not (ready := self._waiting.select()):
                pass
            connection = ready[0][0].fileobj
            assert isinstance(connection, socket.socket)
            self._waiting.unregister(connection)
            return connection

    def _answer(self, num_images: int, job: bytes) -> bytes:
        at = num_images * JOB_IMAGE.size
        images = []
        for kind, size in JOB_IMAGE.iter_unpack(job[:at]):
            images.append((kind, job[at : at + size]))
            at += size
        apply = map if self._decoders is None or num_images == 1 else self._decoders.map
        decoded = list(apply(self._decode, images))
        started = time.monotonic()
        crops = [one.crop for one in decoded if not isinstance(one.crop, Exception)]
        rows: Iterator[Features | Exception]
        try:
            rows = iter(
                self._engine.run_here(crops, is_alone=len(self._jobs) == 1) if crops else ()
            )
        # It concerns this batch alone: whatever an engine raises, the next one is tried.
        except Exception as error:
            logger.exception("the engine failed on a batch of %d images", len(crops))
            rows = repeat(error)
        seconds = time.monotonic() - started
        heads, bodies = [ANSWER_SECONDS.pack(seconds)], []
        for one in decoded:
            result = one.crop if isinstance(one.crop, Exception) else next(rows)
            kind, body = _pack(result)
            heads.append(ANSWER_IMAGE.pack(kind, one.seconds, len(body)))
            bodies.append(body)
        answer = b"".join(heads + bodies)
        return ANSWER.pack(len(answer)) + answer

    def _decode(self, image: tuple[int, bytes]) -> _Decoded:
        kind, data = image
        started = time.monotonic()
        try:
            if kind == CROP:
                crop: Pixels | Exception = np.frombuffer(data, np.uint8).reshape(
                    self._preprocess.height, self._preprocess.width, 3
                )
            else:
                crop = self._preprocess(data, max_pixels=self._max_pixels)
        except ImageError as error:
            crop = error
        # The others of its batch are nobody's fault.
        except Exception as error:
            logger.exception("an image of %d bytes cannot be made a crop", len(data))
            crop = error
        return _Decoded(crop, time.monotonic() - started)


def _speed_up_lone_images(engine: OpenVINOEngine) -> None:
    """Once requests are served, so that nobody waits for it, and they are served without where it fails."""
    try:
        engine.use_all_cores_for_one()
    except Exception:
        logger.exception("a lone image runs on one core")


def _read_line(control: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = control.recv(65536)
        if not part:
            raise EOFError
        line += part
    return line


def _let_http_go_first() -> None:
    """Threads that compute for milliseconds, and all that they start, do not interrupt the process that feeds them when they wake:
    2 % more requests/s on two cores (sched(7))."""
    # Linux alone has it, and a sandbox may forbid it.
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def main(arguments: Sequence[str] | None = None) -> None:
    (fd,) = sys.argv[1:] if arguments is None else arguments
    # Ctrl-C and SIGTERM reach the whole group; what is in flight is finished, and this process ends when the other one has.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _let_http_go_first()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    control = socket.socket(fileno=int(fd))
    try:
        asked = json.loads(_read_line(control))
    except EOFError:
        return
    preprocess = Preprocess.from_dict(asked["preprocess"])
    try:
        engine = build_engine(
            Path(asked["folder"]),
            preprocess,
            asked["config"],
            in_callers_thread=True,
            **asked["options"],
        )
    except Exception as error:
        if not isinstance(error, GraftError):
            logger.exception("the engine cannot be loaded")
        reason = (
            str(error)
            if isinstance(error, GraftError)
            else f"it cannot be loaded ({type(error).__name__})"
        )
        control.sendall(json.dumps({"error": reason}).encode() + b"\n")
        return
    # One more than the engine takes at once: for the golden images of checkpoints that come later.
    pairs = [socket.socketpair() for _ in range(engine.num_slots + 1)]
    for _, outer in pairs:
        # A batch of photographs goes in at once, where the system lets it.
        outer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _JOB_BUFFER_BYTES)
    worker = _Worker(engine, preprocess, asked["max_pixels"], [inner for inner, _ in pairs])
    threads = [
        threading.Thread(target=worker.serve, daemon=True) for _ in range(worker.num_threads)
    ]
    loaded = {
        "info": engine.info.to_dict(),
        "num_features": engine.num_features,
        "num_slots": engine.num_slots,
    }
    socket.send_fds(
        control, [json.dumps(loaded).encode() + b"\n"], [outer.fileno() for _, outer in pairs]
    )
    for _, outer in pairs:
        outer.close()
    gc.collect()
    gc.freeze()
    for thread in threads:
        thread.start()
    if isinstance(engine, OpenVINOEngine):
        _speed_up_lone_images(engine)
    # Nothing more is said on it: it ends with the other process.
    control.recv(1)
    os._exit(0)


if __name__ == "__main__":
    main()
