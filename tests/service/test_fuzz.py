"""Thousands of broken requests, the same every time: no 5xx, no crash, no harm to good requests.

GRAFT_FUZZ_REQUESTS=20000 make test ARGS="tests/service/test_fuzz.py"    # more than by default
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.images import draw_image
from tests.support.servers import LABELS, RunningServer, copy_checkpoint, serve
from tests.support.shared import HANG_SECONDS

NUM_REQUESTS = int(os.environ.get("GRAFT_FUZZ_REQUESTS", "600"))
# Most of them wait for what does not come.
NUM_CLIENTS = 16
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TOKEN = "a-token-for-tests"
BOUNDARY = b"a-boundary"
_MAX_GROWTH_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    copy_checkpoint(colors, folder / "checkpoints", "colors", 1)
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_BODY_SECONDS": "1",
        "GRAFT_MAX_BODY_BYTES": "2000000",
        "GRAFT_MAX_PIXELS": "1000000",
        "GRAFT_ADMIN_TOKEN": TOKEN,
    }
    with serve(folder / "log", env) as running:
        yield running


IMAGES = {
    (label, kind): draw_image(label, 3, (320, 240), kind) for label in LABELS for kind in KINDS
}


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of zeros that is a thousand times larger decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1_000_000))
        + chunk(b"IEND", b"")
    )


def damage(draw: random.Random, data: bytes) -> bytes:
    """Cut, flip, repeat, overwrite: a few times over."""
    mutable = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(mutable) + 1)
        match draw.randrange(6):
            case 0:
                del mutable[at:]
            case 1:
                del mutable[at : at + draw.randint(1, 40)]
            case 2:
                mutable[at:at] = draw.randbytes(draw.randint(1, 40))
            case 3:
                mutable[at:at] = mutable[: draw.randint(0, 200)]
            case _:
                for _ in range(draw.randint(1, 20)):
                    if mutable:
                        mutable[draw.randrange(len(mutable))] = draw.choice(
                            (0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256))
                        )
    return bytes(mutable)


def an_image(draw: random.Random) -> bytes:
    match draw.randrange(10):
        case 0:
            return png_bomb(
                draw.choice((1, 900, 60_000, 2**31 - 1)), draw.choice((1, 900, 60_000, 2**31 - 1))
            )
        case 1:
            return draw.randbytes(draw.randint(0, 2000))
        case _:
            return damage(draw, IMAGES[draw.choice(LABELS), draw.choice(KINDS)])


def multipart(parts: list[tuple[bytes, bytes]]) -> bytes:
    return (
        b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (BOUNDARY, head, data) for head, data in parts)
        + b"--%s--\r\n" % BOUNDARY
    )


def request(
    path: bytes, headers: dict[bytes, bytes], body: bytes, method: bytes = b"POST"
) -> bytes:
    every = {
        b"Host": b"localhost",
        b"Connection": b"close",
        b"Content-Length": b"%d" % len(body),
        **headers,
    }
    head = b"".join(b"%s: %s\r\n" % pair for pair in every.items())
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method, path, head, body)


def raw_image(draw: random.Random) -> bytes:
    return request(b"/predict", {b"Content-Type": b"image/jpeg"}, an_image(draw))


def form_of_images(draw: random.Random) -> bytes:
    parts = [
        (b'Content-Disposition: form-data; name="images"; filename="a.jpg"', an_image(draw))
        for _ in range(draw.randint(1, 5))
    ]
    return request(
        b"/predict",
        {b"Content-Type": b"multipart/form-data; boundary=" + BOUNDARY},
        multipart(parts),
    )


def damaged_form(draw: random.Random) -> bytes:
    good = IMAGES[draw.choice(LABELS), "JPEG"]
    body = multipart(
        [
            (
                b'Content-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
                b"Content-Type: image/jpeg",
                good,
            ),
            (
                b'Content-Disposition: form-data; name="top_k"',
                draw.choice((b"2", b"-1", b"1e9", b"\xff", b'"3"', b"9" * 400)),
            ),
        ]
    )
    content_type = draw.choice(
        (
            b"multipart/form-data; boundary=" + BOUNDARY,
            damage(draw, b"multipart/form-data; boundary=" + BOUNDARY),
        )
    )
    return request(
        b"/predict",
        {b"Content-Type": content_type.replace(b"\r", b"").replace(b"\n", b"")},
        damage(draw, body),
    )


def odd_headers(draw: random.Random) -> bytes:
    headers = {
        b"Content-Type": draw.choice(
            (
                b"",
                b"image/" + b"x" * 3000,
                b"image/jpeg; q=\xff",
                b"*/*",
                b"text/html",
                b"multipart/form-data",
            )
        ),
        b"Content-Length": draw.choice(
            (b"0", b"-1", b"99999999999999999999", b"1e3", b"10", b"2000001")
        ),
        b"X-Request-ID": draw.randbytes(20).replace(b"\r", b"").replace(b"\n", b""),
        b"Authorization": draw.choice(
            (b"Bearer", b"Bearer \xff\xfe", b"Basic " + b"A" * 4000, b"")
        ),
        b"Transfer-Encoding": draw.choice((b"chunked", b"identity", b"gzip, chunked")),
    }
    chosen = {name: headers[name] for name in draw.sample(sorted(headers), draw.randint(1, 3))}
    return request(b"/predict", chosen, IMAGES["red", "JPEG"])


def odd_path(draw: random.Random) -> bytes:
    paths = (
        b"/predict",
        b"/v1/models",
        b"/v1/status",
        b"/docs.json",
        b"/v1/models/colors/rollout",
        b"/v1/models/colors/versions/1:load",
    )
    path = damage(
        draw,
        draw.choice(paths)
        + draw.choice(
            (b"", b"?model=colors", b"?top_k=%00", b"?version=latest", b"/../../etc/passwd")
        ),
    )
    path = bytes(byte for byte in path if 0x21 <= byte <= 0x7E) or b"/"
    method = draw.choice(
        (b"GET", b"POST", b"PATCH", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE", b"BREW")
    )
    return request(b"/" + path.lstrip(b"/"), {}, draw.choice((b"", b"{}")), method)


def odd_json(draw: random.Random) -> bytes:
    values = (
        b"{}",
        b"[]",
        b"null",
        b'{"labels": {"a": 99}}',
        b'{"default": "x"}',
        b'{"canary": {"version": 1, "share": NaN}}',
        b"[" * 9000,
    )
    body = draw.choice((draw.choice(values), damage(draw, draw.choice(values))))
    return request(
        b"/v1/models/colors/rollout",
        {b"Authorization": b"Bearer " + TOKEN.encode()},
        body,
        b"PATCH",
    )


def no_http(draw: random.Random) -> bytes:
    return damage(
        draw, request(b"/predict", {b"Content-Type": b"image/jpeg"}, IMAGES["red", "JPEG"])
    )


KINDS_OF_REQUEST: tuple[Callable[[random.Random], bytes], ...] = (
    raw_image,
    form_of_images,
    damaged_form,
    odd_headers,
    odd_path,
    odd_json,
    no_http,
)


def send(address: tuple[str, int], data: bytes, patience: float = 3) -> bytes:
    """What comes back until the server closes; nothing where it waits for the rest of a request."""
    received = []
    with socket.create_connection(address, timeout=patience) as connection:
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                received.append(piece)
        except (ConnectionResetError, BrokenPipeError, TimeoutError):
            pass
    return b"".join(received)


def check_good(address: tuple[str, int], number: int) -> None:
    label, kind = LABELS[number % len(LABELS)], KINDS[number % len(KINDS)]
    answer = send(
        address,
        request(b"/predict", {b"Content-Type": b"application/octet-stream"}, IMAGES[label, kind]),
        HANG_SECONDS,
    )
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:500]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"][0]["label"] == label


def address_of(server: RunningServer) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def family(server: RunningServer) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def test_broken_requests_of_every_kind(server: RunningServer) -> None:
    address = address_of(server)
    bad: list[tuple[int, bytes, bytes]] = []

    def attack(first: int, end: int) -> None:
        for number in range(first, end):
            draw = random.Random(number)
            data = draw.choice(KINDS_OF_REQUEST)(draw)
            answer = send(address, data)
            status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
            if status >= 500 or (answer and not status):
                bad.append((number, data[:300], answer[:300]))
            if number % 10 == 0:
                check_good(address, number)

    def attack_at_once(first: int, end: int) -> None:
        bounds = [first + (end - first) * index // NUM_CLIENTS for index in range(NUM_CLIENTS + 1)]
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            for running in [pool.submit(attack, *pair) for pair in pairwise(bounds)]:
                running.result()

    attack_at_once(0, NUM_REQUESTS // 3)
    before = family(server)
    memory = sum(process.memory_info().rss for process in before)
    files = sum(process.num_fds() for process in before)
    attack_at_once(NUM_REQUESTS // 3, NUM_REQUESTS)
    assert bad == []
    assert [process.pid for process in family(server)] == [process.pid for process in before], (
        "a process was replaced"
    )
    assert sum(process.memory_info().rss for process in before) - memory < _MAX_GROWTH_BYTES
    assert sum(process.num_fds() for process in before) - files <= 2
    assert "Traceback" not in server.log()
    assert httpx.get(server.url + "/readyz").status_code == 200


def test_one_broken_image_in_a_batch_of_16_harms_nobody(
    server: RunningServer, tmp_path: Path
) -> None:
    draw = random.Random(0)
    for position in range(16):
        labels = [draw.choice(LABELS) for _ in range(16)]
        images = [IMAGES[label, draw.choice(KINDS)] for label in labels]
        images[position] = images[position][:20]
        response = httpx.post(
            server.url + "/predict",
            files=[("images", ("a", image)) for image in images],
            timeout=HANG_SECONDS,
        )
        found = [entry.get("label") for entry in response.json()["predictions"]]
        assert found == [None if index == position else label for index, label in enumerate(labels)]


def test_what_the_description_allows_and_what_it_does_not(
    server: RunningServer, tmp_path: Path
) -> None:
    """Schemathesis tries the bounds of every parameter and body that /docs.json describes.

    Each answer must be one that is described there.
    """
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    command += [f"{server.url}/docs.json", "--header", f"Authorization: Bearer {TOKEN}"]
    # The description does not say that only a real image is taken, nor that no model is left
    # (503) once the only one is unloaded.
    command += ["--exclude-checks", "positive_data_acceptance,negative_data_rejection"]
    command += ["--exclude-path-regex", ":unload$"]
    command += ["--phases", "coverage,fuzzing", "--seed", "1", "--generation-database", "none"]
    command += ["--max-examples", str(max(5, NUM_REQUESTS // 60))]
    command += ["--request-timeout", str(HANG_SECONDS), "--continue-on-failure", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Traceback" not in server.log()
    check_good(address_of(server), 0)
