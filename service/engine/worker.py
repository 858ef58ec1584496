"""A backbone's engine in a process of its own: encoded images in, features out.

    python -m service.engine.worker FD

`EngineProcess` starts it. Decoding, the engine and HTTP in one process would share Python's lock:
apart from the engine the service answers 12 % more requests on two cores, and a crash of the engine
does not end the answers of others.

FD is a socket. It receives what to load, as a line of JSON, and sends back what was loaded or why
not, with a channel for each batch that may be in flight. Then as many threads as compute at once
take the jobs of these channels; wire.py has their format. The process ends when the server's end of
the socket or of a channel is closed, for whatever reason.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from models.engine.engine import Engine, Features
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.processor import num_cpus
from models.errors import GraftError
from models.images import ImageError, Pixels
from models.prepared import build_engine
from models.preprocess import Preprocess
from service.engine.wire import Channel, JobImage, Outcome, Result, pack_outcome, unpack_job

# A batch of photographs; the system may allow less.
_JOB_BUFFER_BYTES = 1 << 20

logger = logging.getLogger("graft.engine")


@dataclass(frozen=True)
class _Decoded:
    crop: Pixels | Exception
    seconds: float


class _Worker:
    """Threads that each take the next job of any channel, as many as compute at once.

    So none sleeps while there is work: with a thread per channel two of five waited for one core
    while the other was idle.
    """

    def __init__(
        self,
        engine: Engine,
        preprocess: Preprocess,
        max_pixels: int,
        channels: Sequence[Channel],
    ) -> None:
        self._engine = engine
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self.num_threads = (
            engine.info.num_streams if isinstance(engine, OpenVINOEngine) else len(channels)
        )
        # Where these threads would leave cores idle while they decode, as the two of a GPU would,
        # more threads decode each batch.
        has_idle_cores = engine.info.batch_size > 1 and self.num_threads < num_cpus()
        self._decoders = (
            ThreadPoolExecutor(num_cpus(), thread_name_prefix="decode") if has_idle_cores else None
        )
        # An entry per running job: the length of a list changes atomically.
        self._jobs: list[None] = []
        self._with_jobs = selectors.DefaultSelector()
        self._one_selects = threading.Lock()
        for channel in channels:
            self._with_jobs.register(channel, selectors.EVENT_READ)

    def serve(self) -> None:
        """Do jobs until a channel's other end is closed, then end the process."""
        try:
            while True:
                channel = self._next()
                images = unpack_job(channel.receive())
                self._jobs.append(None)
                outcome = self._run(images)
                self._jobs.pop()
                channel.send(pack_outcome(outcome))
                self._with_jobs.register(channel, selectors.EVENT_READ)
        except (EOFError, OSError):
            os._exit(0)

    def _next(self) -> Channel:
        """A channel with a job, for this thread alone until it registers it again."""
        with self._one_selects:
            while not (ready := self._with_jobs.select()):
                pass
            channel = ready[0][0].fileobj
            assert isinstance(channel, Channel)
            self._with_jobs.unregister(channel)
            return channel

    def _run(self, images: Sequence[JobImage]) -> Outcome:
        apply = map if self._decoders is None or len(images) == 1 else self._decoders.map
        decoded = list(apply(self._decode, images))
        started = time.monotonic()
        rows = self._run_engine(
            [one.crop for one in decoded if not isinstance(one.crop, Exception)]
        )
        seconds = time.monotonic() - started
        results: list[Result] = [
            one.crop if isinstance(one.crop, Exception) else next(rows) for one in decoded
        ]
        return Outcome(results, [one.seconds for one in decoded], seconds)

    def _run_engine(self, crops: Sequence[Pixels]) -> Iterator[Features | Exception]:
        if not crops:
            return iter(())
        try:
            return iter(self._engine.run_here(crops, is_alone=len(self._jobs) == 1))
        # Whatever an engine raises concerns this batch alone: the next one is tried.
        except Exception as error:
            logger.exception("the engine failed on a batch of %d images", len(crops))
            return repeat(error)

    def _decode(self, image: JobImage) -> _Decoded:
        started = time.monotonic()
        try:
            if image.is_encoded:
                crop: Pixels | Exception = self._preprocess(image.data, max_pixels=self._max_pixels)
            else:
                crop = np.frombuffer(image.data, np.uint8).reshape(
                    self._preprocess.height, self._preprocess.width, 3
                )
        except ImageError as error:
            crop = error
        # Whatever the image made a library raise, the others of its batch are computed.
        except Exception as error:
            logger.exception("an image of %d bytes cannot be made a crop", len(image.data))
            crop = error
        return _Decoded(crop, time.monotonic() - started)


def _speed_up_lone_images(engine: OpenVINOEngine) -> None:
    """After the start, so that no request waits for it; without it they are slower."""
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


def _yield_to_http() -> None:
    """Threads that wake up do not preempt the server's process: 2 % more requests/s on two cores.

    They compute for milliseconds, the server for microseconds (SCHED_BATCH, sched(7)).
    """
    # Linux alone has it, and a sandbox may forbid it.
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _load(request: Mapping[str, Any], preprocess: Preprocess) -> Engine | str:
    """The engine, or why it cannot be loaded."""
    try:
        return build_engine(
            Path(request["folder"]),
            preprocess,
            request["config"],
            in_callers_thread=True,
            **request["options"],
        )
    except GraftError as error:
        return str(error)
    except Exception as error:
        logger.exception("the engine cannot be loaded")
        return f"it cannot be loaded ({type(error).__name__})"


def _connect(control: socket.socket, engine: Engine) -> list[Channel]:
    """Send what was loaded, with the other ends of the channels that are returned."""
    # One more than the engine takes at once: for the golden images of later checkpoints.
    pairs = [socket.socketpair() for _ in range(engine.num_slots + 1)]
    for _, outer in pairs:
        # The server writes a whole batch at once.
        outer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _JOB_BUFFER_BYTES)
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
    return [Channel(inner) for inner, _ in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    (fd,) = sys.argv[1:] if arguments is None else arguments
    # Ctrl-C and SIGTERM reach the whole group: this process ends after the server, which finishes
    # its requests first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _yield_to_http()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    control = socket.socket(fileno=int(fd))
    try:
        request = json.loads(_read_line(control))
    except EOFError:
        return
    preprocess = Preprocess.from_dict(request["preprocess"])
    engine = _load(request, preprocess)
    if isinstance(engine, str):
        control.sendall(json.dumps({"error": engine}).encode() + b"\n")
        return
    worker = _Worker(engine, preprocess, request["max_pixels"], _connect(control, engine))
    gc.collect()
    gc.freeze()
    for _ in range(worker.num_threads):
        threading.Thread(target=worker.serve, daemon=True).start()
    if isinstance(engine, OpenVINOEngine):
        _speed_up_lone_images(engine)
    # Nothing more comes but the end of the server.
    control.recv(1)
    os._exit(0)


if __name__ == "__main__":
    main()
