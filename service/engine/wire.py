"""What the server and its engine's process send one another: MessagePack on a socket, no pickle.

job      [[is encoded, data], …]: an encoded file or the pixels of a crop for each image
outcome  [engine seconds, [decode seconds, …], [features or [error, message], …]]
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np

from models.engine.engine import Features
from models.images import ImageError, ImageTooLargeError, Pixels

# An encoded file, or a crop.
Image = bytes | Pixels
# Features `float32 [F]`, or why there are none: the image is unreadable, or the engine failed.
Result = Features | Exception

_ERRORS: dict[str, type[Exception]] = {
    "unreadable": ImageError,
    "too_large": ImageTooLargeError,
    "failed": RuntimeError,
}
_RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True)
class Outcome:
    """The results of a batch, the seconds to decode each image, and the engine's seconds."""

    results: Sequence[Result]
    decode_seconds: Sequence[float]
    engine_seconds: float


class JobImage(NamedTuple):
    """An image as the engine's process gets it: an encoded file, or the bytes of a crop."""

    is_encoded: bool
    data: bytes


class Channel:
    """One end of a connection. One thread at a time sends a message and awaits the answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        # Without a limit: the size of a job is bounded by those of requests and batches.
        self._unpacker = msgpack.Unpacker(max_buffer_size=0)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: bytes) -> None:
        """Blocks until all is sent; raises OSError where the other end is closed."""
        self.connection.sendall(message)

    def receive(self) -> Any:
        """Blocks until a message is whole; raises EOFError or OSError where the end is closed."""
        while (message := self.receive_part()) is None:
            pass
        return message

    def receive_part(self) -> Any:
        """Reads what is there: the message where it is whole now, else None.

        Raises BlockingIOError where nothing is there, else as `receive`.
        """
        received = self.connection.recv(_RECEIVE_BYTES)
        if not received:
            raise EOFError
        self._unpacker.feed(received)
        return next(self._unpacker, None)

    def close(self) -> None:
        self.connection.close()


def pack_job(images: Sequence[Image]) -> bytes:
    packed: bytes = msgpack.packb(
        [
            (True, image) if isinstance(image, bytes) else (False, image.tobytes())
            for image in images
        ]
    )
    return packed


def unpack_job(message: Any) -> list[JobImage]:
    return [JobImage(*image) for image in message]


def pack_outcome(outcome: Outcome) -> bytes:
    results = [
        _describe(one) if isinstance(one, Exception) else one.tobytes() for one in outcome.results
    ]
    packed: bytes = msgpack.packb((outcome.engine_seconds, outcome.decode_seconds, results))
    return packed


def unpack_outcome(message: Any) -> Outcome:
    engine_seconds, decode_seconds, packed = message
    results: list[Result] = [
        np.frombuffer(one, np.float32) if isinstance(one, bytes) else _ERRORS[one[0]](one[1])
        for one in packed
    ]
    return Outcome(results, decode_seconds, engine_seconds)


def _describe(error: Exception) -> tuple[str, str]:
    if isinstance(error, ImageTooLargeError):
        return "too_large", str(error)
    if isinstance(error, ImageError):
        return "unreadable", str(error)
    # What the engine raised is in its log.
    return "failed", "the engine failed"
