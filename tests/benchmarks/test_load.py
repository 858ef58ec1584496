"""The benchmark's load generator: what it sends arrives, and what it counts is what happened."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.load import Requests, Sent, open_loop, summarize, write_bodies


class Recorder(BaseHTTPRequestHandler):
    """Answers 200, every third request 429, and a path with "slow" late."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, bytes]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, body))
        if "slow" in self.path:
            time.sleep(0.3)
        self.send_response(429 if len(self.seen) % 3 == 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Nothing: the test counts."""


@contextmanager
def record() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    class OwnRecorder(Recorder):
        seen: ClassVar[list[tuple[str, bytes]]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), OwnRecorder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", OwnRecorder.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_request_arrives_with_its_image(tmp_path: Path) -> None:
    requests = Requests(
        write_bodies([b"first", b"second"], tmp_path), targets=("/predict?model=a",)
    )
    with record() as (url, seen):
        sent = open_loop(url, requests, per_second=100, seconds=0.5)
    assert 20 < len(sent) == len(seen) < 90
    assert {path for path, _ in seen} == {"/predict?model=a"}
    assert sum(b"\r\n\r\nfirst\r\n" in body for _, body in seen) == pytest.approx(
        len(seen) / 2, abs=1
    )


def test_refusals_are_counted_apart_from_goodput(tmp_path: Path) -> None:
    with record() as (url, seen):
        sent = open_loop(
            url, Requests(write_bodies([b"image"], tmp_path)), per_second=100, seconds=0.5
        )
    found = summarize(sent, 0.5)
    assert found["num_refused"] == len(seen) // 3
    assert found["num_good"] + found["num_refused"] == len(sent)
    assert found["num_broken"] == 0


def test_the_loop_is_open_so_slow_answers_do_not_slow_it_down(tmp_path: Path) -> None:
    requests = Requests(write_bodies([b"image"], tmp_path), targets=("/slow",))
    with record() as (url, _):
        sent = open_loop(url, requests, per_second=40, seconds=0.5)
    assert len(sent) > 8
    assert all(one.ended - one.due >= 0.3 for one in sent)


def test_a_server_that_is_not_there_counts_as_broken(tmp_path: Path) -> None:
    sent = open_loop(
        "http://127.0.0.1:9",
        Requests(write_bodies([b"image"], tmp_path)),
        per_second=50,
        seconds=0.2,
    )
    assert sent
    assert summarize(sent, 0.2)["num_broken"] == len(sent)


def test_goodput_leaves_out_what_came_after_the_load() -> None:
    found = summarize([Sent(0.1, 0.2, 200), Sent(0.9, 1.4, 200)], 1.0)
    assert found["per_second"] == 1
    assert found["num_good"] == 2
    assert found["p99_ms"] == pytest.approx(500)
