"""What the server and its engine process send one another."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.engine.engine import Features
from models.images import ImageError, ImageTooLargeError, Pixels

# An encoded file, or the crop itself.
Image = bytes | Pixels
# Features `float32 [F]`, or why there are none: the image cannot be read, or the engine failed on it.
Result = Features | Exception


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: a result and the seconds of decoding for each image, and the engine's seconds for all of them."""

    results: Sequence[Result]
    decode_seconds: Sequence[float]
    engine_seconds: float


def _job(images: Sequence[Image]) -> list[bytes | memoryview]:
    parts = [
        image if isinstance(image, bytes) else np.ascontiguousarray(image).data.cast("B")
        for image in images
    ]
    kinds = [ENCODED if isinstance(image, bytes) else CROP for image in images]
    head = [JOB.pack(len(parts), sum(map(len, parts)))]
    head += [JOB_IMAGE.pack(kind, len(part)) for kind, part in zip(kinds, parts, strict=True)]
    return [b"".join(head), *parts]


def _outcome(answer: memoryview, num_images: int) -> Outcome:
    (engine_seconds,) = ANSWER_SECONDS.unpack_from(answer)
    heads = answer[ANSWER_SECONDS.size : ANSWER_SECONDS.size + num_images * ANSWER_IMAGE.size]
    at = ANSWER_SECONDS.size + len(heads)
    results: list[Result] = []
    seconds = []
    for kind, decode_seconds, size in ANSWER_IMAGE.iter_unpack(heads):
        body = answer[at : at + size]
        at += size
        seconds.append(decode_seconds)
        if kind == FEATURES:
            results.append(np.frombuffer(body, np.float32))
        elif kind == FAILED:
            results.append(RuntimeError(str(body, "utf-8")))
        else:
            results.append(
                (ImageTooLargeError if kind == TOO_LARGE else ImageError)(str(body, "utf-8"))
            )
    return Outcome(results, seconds, engine_seconds)


JOB = struct.Struct("<IQ")
JOB_IMAGE = struct.Struct("<BI")
ANSWER = struct.Struct("<I")
ANSWER_SECONDS = struct.Struct("<d")
ANSWER_IMAGE = struct.Struct("<BdI")


ENCODED, CROP = range(2)


FEATURES, UNREADABLE, TOO_LARGE, FAILED = range(4)


def _pack(result: Features | Exception) -> tuple[int, bytes]:
    if not isinstance(result, Exception):
        return FEATURES, result.tobytes()
    if isinstance(result, ImageError):
        return TOO_LARGE if isinstance(result, ImageTooLargeError) else UNREADABLE, str(
            result
        ).encode()
    return FAILED, b"the engine failed"


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    parts = []
    while num_bytes:
        part = connection.recv(num_bytes, socket.MSG_WAITALL)
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
