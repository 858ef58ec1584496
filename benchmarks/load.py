"""Load on a server: closed loops by wrk, whose figures are taken as it prints them, and open loops by a client on asyncio."""

from __future__ import annotations

import asyncio
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import httptools
import uvloop

LUA_SCRIPT = Path(__file__).with_name("post_images.lua")
_BOUNDARY = "graft-benchmark"
_CONTENT_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"
# An answer that takes longer has been given up by any client.
TIMEOUT_SECONDS = 30.0
_REFUSED = (429, 503)

T = TypeVar("T")


@dataclass(frozen=True)
class Requests:
    """What is sent, in turn: form uploads (files with the bodies) to `targets`, which are paths with their queries; GET without bodies."""

    body_paths: tuple[Path, ...]
    targets: tuple[str, ...] = ("/predict",)

    def encode(self) -> list[bytes]:
        """Each request in full, as it goes over the wire."""
        bodies = [path.read_bytes() for path in self.body_paths]
        count = max(len(bodies), len(self.targets))
        return [_encode_post(self.targets[index % len(self.targets)], bodies[index % len(bodies)]) for index in range(count)]


def write_bodies(images: Sequence[bytes], folder: Path) -> tuple[Path, ...]:
    """A form with one file in the field `images` for each image: the one upload that every framework takes as it comes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{index:03d}.form" for index in range(len(images)))
    for path, image in zip(paths, images, strict=True):
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="{path.stem}.jpg"\r\n'
        path.write_bytes(head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + f"\r\n--{_BOUNDARY}--\r\n".encode())
    return paths


def check_wrk() -> None:
    """Raises RuntimeError where wrk is missing."""
    if shutil.which("wrk") is None:
        raise RuntimeError("wrk, which makes the load, is not installed; apt-get install wrk")


def closed_loop(url: str, requests: Requests, *, num_clients: int, seconds: float) -> dict[str, float]:
    """wrk with one connection a client, each of which sends its next request when it has its answer.

    Gives answers a second, latencies, what was not answered 2xx, and wrk's own processor time.
    """
    command = [
        "wrk",
        "-t1",
        f"-c{num_clients}",
        f"-d{math.ceil(seconds)}s",
        f"--timeout={TIMEOUT_SECONDS:g}s",
        "-s",
        str(LUA_SCRIPT),
        url,
        "--",
    ]
    command += [_CONTENT_TYPE, " ".join(requests.targets), *map(str, requests.body_paths)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 2 * TIMEOUT_SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if finished.returncode:
        raise RuntimeError(f"wrk exited {finished.returncode}: {finished.stdout}{finished.stderr}")
    counted: dict[str, float] = json.loads(finished.stdout.strip().splitlines()[-1])
    good = counted["num_answers"] - counted["num_refused"]
    if not counted["num_answers"]:
        counted |= dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"), float("nan"))
    cpu_seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {**counted, "per_second": good / counted["seconds"], "client_cpu_seconds": cpu_seconds}


@dataclass(frozen=True)
class Sent:
    """A request of an open loop: when it was due and when it ended, in seconds from the start; 0 is no answer in time."""

    due: float
    ended: float
    status: int

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300


def open_loop(url: str, requests: Requests, *, per_second: float, seconds: float, seed: int = 0) -> list[Sent]:
    """Requests that come as those of many strangers do (a Poisson process), whether or not the others have been answered."""
    return run_loop(_open_loop(url, requests.encode(), per_second, seconds, random.Random(seed)))


def summarize(sent: Sequence[Sent], seconds: float) -> dict[str, float]:
    """Goodput counts what was answered while the load lasted; latencies run from when a request was due, and are those of good answers."""
    good = sorted(1000 * (one.ended - one.due) for one in sent if one.is_good)
    statuses = Counter(one.status for one in sent)
    num_refused = sum(statuses[status] for status in _REFUSED)
    return {
        "offered_per_second": len(sent) / seconds,
        "per_second": sum(one.is_good and one.ended <= seconds for one in sent) / seconds,
        "num_answers": len(sent) - statuses[0],
        "num_good": len(good),
        "num_refused": num_refused,
        "num_broken": len(sent) - len(good) - num_refused,
        "p50_ms": _percentile(good, 0.50),
        "p99_ms": _percentile(good, 0.99),
    }


def good_by_second(sent: Sequence[Sent], num_seconds: int) -> list[float]:
    """Good answers in each second."""
    counted = Counter(int(one.ended) for one in sent if one.is_good)
    return [float(counted[second]) for second in range(num_seconds)]


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on uvloop. SIGTERM ends it and the process: what a handler of Python's raises inside its callbacks is dropped there."""
    handler = signal.getsignal(signal.SIGTERM)

    async def until_terminated() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return uvloop.run(until_terminated())
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    finally:
        # The loop took it and gives back the system's own.
        signal.signal(signal.SIGTERM, handler)


class Client:
    """Sends encoded requests to one server, each on a connection that no other uses at the time."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._idle: deque[_Connection] = deque()

    async def send(self, request: bytes, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[int, bytes]:
        """The answer's status and body; status 0 where none came in time or the connection broke."""
        connection = None
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = await self._connect()
                answer = await connection.ask(request)
        except (TimeoutError, OSError, httptools.HttpParserError):
            if connection is not None:
                connection.close()
            return 0, b""
        if connection.is_open:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection


class _Connection(asyncio.Protocol):
    """One request at a time over one connection. What costs the generator costs the server, on cores that they share."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._body = []
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are none of asyncio's classes.
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._fail(error if isinstance(error, OSError) else ConnectionResetError("the server closed the connection"))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


async def _open_loop(url: str, encoded: Sequence[bytes], per_second: float, seconds: float, chance: random.Random) -> list[Sent]:
    client = Client(url)
    sent: list[Sent] = []
    started = time.perf_counter()

    async def send(request: bytes, due: float) -> None:
        status, _ = await client.send(request)
        sent.append(Sent(due, time.perf_counter() - started, status))

    due, index = chance.expovariate(per_second), 0
    async with asyncio.TaskGroup() as group:
        while due < seconds:
            # A generator that is late sends at once what is due, and the lateness counts as latency.
            wait = due - (time.perf_counter() - started)
            if wait > 0:
                await asyncio.sleep(wait)
            group.create_task(send(encoded[index % len(encoded)], due))
            due, index = due + chance.expovariate(per_second), index + 1
    client.close()
    return sent


def encode_get(target: str) -> bytes:
    """A GET request as it goes over the wire."""
    return f"GET {target} HTTP/1.1\r\nHost: benchmark\r\n\r\n".encode()


def _encode_post(target: str, body: bytes) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: {_CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """The nearest rank; not a number where there is nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else float("nan")
