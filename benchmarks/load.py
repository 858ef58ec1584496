"""Load on a server: closed loops by wrk, open loops by a client on asyncio."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import resource
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.client import TIMEOUT_SECONDS, Client, run_loop

LUA_SCRIPT = Path(__file__).with_name("post_images.lua")
_BOUNDARY = "graft-benchmark"
_CONTENT_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"
_REFUSED = (429, 503)


@dataclass(frozen=True)
class Requests:
    """Form uploads that are sent in turn.

    `body_paths` are files of encoded bodies, `targets` paths with queries.
    """

    body_paths: tuple[Path, ...]
    targets: tuple[str, ...] = ("/predict",)

    def encode(self) -> list[bytes]:
        """Each request in full, as it goes over the wire."""
        bodies = [path.read_bytes() for path in self.body_paths]
        count = max(len(bodies), len(self.targets))
        return [
            _encode_post(self.targets[index % len(self.targets)], bodies[index % len(bodies)])
            for index in range(count)
        ]


def write_bodies(images: Sequence[bytes], folder: Path) -> tuple[Path, ...]:
    """For each image a form with one file in the field `images`, which every framework accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{index:03d}.form" for index in range(len(images)))
    for path, image in zip(paths, images, strict=True):
        head = (
            f"--{_BOUNDARY}\r\n"
            f'Content-Disposition: form-data; name="images"; filename="{path.stem}.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        path.write_bytes(head.encode() + image + f"\r\n--{_BOUNDARY}--\r\n".encode())
    return paths


def check_wrk() -> None:
    """Raises RuntimeError where wrk is missing."""
    if shutil.which("wrk") is None:
        raise RuntimeError("wrk, which makes the load, is not installed; apt-get install wrk")


def closed_loop(
    url: str, requests: Requests, *, num_clients: int, seconds: float
) -> dict[str, float]:
    """Run wrk with one connection a client, each of which sends when it has its last answer.

    Returns good answers/s, latencies, answers other than 2xx, and wrk's processor time.
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
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 2 * TIMEOUT_SECONDS
    )
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
    """A request of an open loop, in seconds from its start; status 0: no answer in time."""

    due: float
    ended: float
    status: int

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300


def open_loop(
    url: str, requests: Requests, *, per_second: float, seconds: float, seed: int = 0
) -> list[Sent]:
    """Send requests at random times (a Poisson process), whether or not others are answered."""
    with _as_batch_job():
        return run_loop(
            _open_loop(url, requests.encode(), per_second, seconds, random.Random(seed))
        )


def summarize(sent: Sequence[Sent], seconds: float) -> dict[str, float]:
    """Figures of an open loop of `seconds`.

    Goodput counts good answers while the load lasted. Latencies are those of good answers, from
    when the request was due.
    """
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


@contextmanager
def _as_batch_job() -> Iterator[None]:
    """Run as a batch job (sched(7)), which does not preempt the server.

    On shared cores a generator that wakes for each answer would interrupt the server, as one on
    another machine would not. What it sends late counts as latency.
    """
    with suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class _OpenLoop:
    """One running open loop."""

    def __init__(
        self,
        client: Client,
        encoded: Sequence[bytes],
        per_second: float,
        seconds: float,
        chance: random.Random,
    ) -> None:
        self._client = client
        self._encoded = encoded
        self._per_second = per_second
        self._seconds = seconds
        self._chance = chance
        self._due = 0.0
        self._num_sent = 0
        self._sent: list[Sent] = []
        self._started = time.perf_counter()
        self._is_over = asyncio.Event()

    async def run(self) -> list[Sent]:
        """All requests in the order of their answers; the unanswered ones come last.

        A request without an answer TIMEOUT_SECONDS after the load's end counts as unanswered.
        """
        self._draw_next()
        self._send_due()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds + TIMEOUT_SECONDS):
                await self._is_over.wait()
        num_unanswered = self._num_sent - len(self._sent)
        return self._sent + [Sent(self._seconds, self._now(), 0)] * num_unanswered

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _draw_next(self) -> None:
        self._due += self._chance.expovariate(self._per_second)

    def _send_due(self) -> None:
        """Send all that is due; what is sent late counts as latency."""
        now = self._now()
        while self._due <= now and self._due < self._seconds:
            self._client.start(
                self._encoded[self._num_sent % len(self._encoded)],
                partial(self._answered, self._due),
            )
            self._num_sent += 1
            self._draw_next()
        if self._due < self._seconds:
            # Timers count in milliseconds, and a shorter one would be over at once.
            asyncio.get_running_loop().call_later(max(self._due - now, 0.001), self._send_due)
        else:
            self._check_over()

    def _answered(self, due: float, status: int, body: bytes) -> None:
        ended = self._now()
        self._sent.append(Sent(due, ended, status if ended - due <= TIMEOUT_SECONDS else 0))
        self._check_over()

    def _check_over(self) -> None:
        if self._due >= self._seconds and len(self._sent) == self._num_sent:
            self._is_over.set()


async def _open_loop(
    url: str, encoded: Sequence[bytes], per_second: float, seconds: float, chance: random.Random
) -> list[Sent]:
    client = Client(url)
    sent = await _OpenLoop(client, encoded, per_second, seconds, chance).run()
    client.close()
    return sent


def _encode_post(target: str, body: bytes) -> bytes:
    head = (
        f"POST {target} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: {_CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """The nearest rank; NaN of nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else float("nan")
