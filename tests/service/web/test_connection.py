"""The real server through plain sockets: offers of an upgrade, slow headers, what is no request."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from uvicorn.config import HTTP_PROTOCOLS, Config

from service.web.connection import Connection
from tests.support.images import draw_image
from tests.support.servers import RunningServer, copy_checkpoint, serve

HEADER_SECONDS = 1.0
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
IMAGE = draw_image("red", size=(800, 600))
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'
    + IMAGE
    + b"\r\n--b--\r\n"
)
JPEG = b"Content-Type: image/jpeg\r\n"
PLAIN = b"POST /predict HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (JPEG, len(IMAGE))


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    copy_checkpoint(colors, folder / "checkpoints", "colors", 1)
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_HEADER_SECONDS": str(HEADER_SECONDS),
        "GRAFT_MAX_BODY_BYTES": "2000000",
    }
    with serve(folder / "log", env) as running:
        yield running


def connect(server: RunningServer) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30)


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, object]]]:
    """Status and JSON of the next answers; an interim one (100) is an answer without JSON."""
    answers: list[tuple[int, dict[str, object]]] = []
    stream = connection.makefile("rb")
    while len(answers) < count:
        line = stream.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        size = 0
        while (header := stream.readline().strip()) != b"":
            name, _, value = header.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        answers.append((int(line.split()[1]), json.loads(stream.read(size)) if size else {}))
    return answers


def read_rest(connection: socket.socket) -> bytes:
    """All until the server closes."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def request(body: bytes, *headers: bytes, first: bytes = b"POST /predict HTTP/1.1") -> bytes:
    return b"".join([first, b"\r\nHost: x\r\n", *headers, b"\r\n", body])


def sized(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


def chunked(body: bytes, size: int = 1000) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def is_red(answer: tuple[int, dict[str, object]]) -> bool:
    status, body = answer
    predictions = body.get("predictions")
    assert isinstance(predictions, list), body
    return status == 200 and predictions[0]["label"] == "red"


def count_of(server: RunningServer, reason: str) -> float:
    """How many requests were refused for this reason, by /metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    series = f'graft_rejected_total{{model="",reason="{reason}",version=""}} '
    return sum(float(line.removeprefix(series)) for line in text.splitlines() if series in line)


ZIPPED = gzip.compress(IMAGE)


@pytest.mark.parametrize(
    "data",
    [
        request(IMAGE, JPEG, sized(IMAGE), H2C),
        request(IMAGE, H2C, sized(IMAGE), JPEG),
        request(IMAGE, JPEG, sized(IMAGE), H2C.upper().replace(b"H2C", b"h2c")),
        request(chunked(IMAGE), JPEG, b"Transfer-Encoding: chunked\r\n", H2C),
        request(FORM, b"Content-Type: multipart/form-data; boundary=b\r\n", sized(FORM), H2C),
        request(ZIPPED, JPEG, b"Content-Encoding: gzip\r\n", sized(ZIPPED), H2C),
        request(IMAGE, JPEG, sized(IMAGE), b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        request(IMAGE, JPEG, sized(IMAGE), b"Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n"),
        request(IMAGE, JPEG, sized(IMAGE), b"Connection: keep-alive, Upgrade\r\nUpgrade: a, b\r\n"),
        request(IMAGE, JPEG, sized(IMAGE), b"Upgrade: h2c\r\n"),
        request(IMAGE, JPEG, sized(IMAGE), b"Connection: Upgrade\r\n"),
        request(IMAGE, JPEG, sized(IMAGE), H2C, b"Upgrade: websocket\r\n"),
    ],
    ids=[
        "h2c last",
        "h2c first",
        "capitals",
        "chunked",
        "form",
        "gzip",
        "websocket",
        "TLS",
        "two protocols",
        "no Connection",
        "no Upgrade",
        "twice",
    ],
)
@pytest.mark.parametrize("segment_bytes", [1_000_000, 700, 50], ids=["whole", "in 700", "in 50"])
def test_an_upgrade_that_is_offered_is_ignored(
    server: RunningServer, data: bytes, segment_bytes: int
) -> None:
    """And the connection goes on: the same again, and without the offer, in one write."""
    with closing(connect(server)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), segment_bytes):
            connection.sendall(data[start : start + segment_bytes])
            # So that headers and body arrive in different reads.
            time.sleep(0.001 if start < 1000 else 0)
        assert is_red(read_answers(connection, 1)[0])
        connection.sendall(data + PLAIN + IMAGE)
        assert all(map(is_red, read_answers(connection, 2)))


def test_an_upgrade_with_expect_is_told_to_continue(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        head = request(b"", JPEG, sized(IMAGE), H2C, b"Expect: 100-continue\r\n")
        connection.sendall(head)
        assert read_answers(connection, 1) == [(100, {})]
        connection.sendall(IMAGE)
        assert is_red(read_answers(connection, 1)[0])


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"POST /predict HTTP/1.0", b""),
        (b"POST /predict HTTP/1.1", b"Connection: close\r\n"),
        (b"POST /predict HTTP/1.1", b"Connection: close, Upgrade\r\n"),
    ],
    ids=["HTTP/1.0", "close", "close in one header"],
)
def test_an_upgrade_may_be_the_last_request(
    server: RunningServer, first: bytes, more: bytes
) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(request(IMAGE, JPEG, sized(IMAGE), H2C, more, first=first))
        assert b'"red"' in read_rest(connection)


def test_thousands_of_offers_in_one_write(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(3000 * request(b"", H2C, first=b"GET /livez HTTP/1.1"))
        connection.sendall(PLAIN + IMAGE)
        stream = connection.makefile("rb")
        while not (line := stream.readline()).startswith(b'{"model"'):
            assert line
        assert b'"red"' in line


@pytest.mark.parametrize("num_zeros", [5000, 60_000])
def test_a_length_with_thousands_of_zeros_in_front(server: RunningServer, num_zeros: int) -> None:
    length = b"Content-Length: %s%d\r\n" % (b"0" * num_zeros, len(IMAGE))
    with connect(server) as connection:
        connection.sendall(request(IMAGE, JPEG, length))
        (answer,) = read_answers(connection, 1)
    assert is_red(answer)


CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"


def test_images_of_a_client_that_has_left_are_not_computed(server: RunningServer) -> None:
    form = FORM.removesuffix(b"--b--\r\n")
    body = 16 * form + b"--b--\r\n"
    typed = b"Content-Type: multipart/form-data; boundary=b\r\n"
    # Together they take longer than it takes to notice that a client has left.
    connections = [connect(server) for _ in range(8)]
    for connection in connections:
        connection.sendall(request(body, typed, sized(body)))
    time.sleep(0.2)
    for connection in connections:
        connection.close()
    left = re.compile(r'graft_requests_total\{route="/predict",status="499"\} [1-9]')
    deadline = time.monotonic() + 60
    while not left.search(httpx.get(f"{server.url}/metrics").text):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("coding", "status"),
    [
        (b"gzip, chunked", 501),
        (b"gzip\r\nTransfer-Encoding: chunked", 501),
        (b"deflate,chunked", 501),
        (b"Chunked", 200),
    ],
)
def test_a_transfer_coding_that_is_not_undone_is_told(
    server: RunningServer, coding: bytes, status: int
) -> None:
    with connect(server) as connection:
        connection.sendall(
            request(chunked(IMAGE), JPEG, b"Transfer-Encoding: " + coding + b"\r\n")
            + request(b"", first=b"GET /v1/status HTTP/1.1")
        )
        (answer, after) = read_answers(connection, 2)
    assert (answer[0], after[0]) == (status, 200)
    if status == 501:
        assert "Content-Encoding" in json.dumps(answer[1])


def test_an_upgrade_without_a_body(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(2 * request(b"", H2C, first=b"GET /v1/models HTTP/1.1"))
        assert [status for status, _ in read_answers(connection, 2)] == [200, 200]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"P"],
        [b"POST /predict HTTP/1.1\r\nHost: x\r\nX: ", *20 * [b"a"]],
        [b"POST /predict HTTP/1.1\r\n", *20 * [b"X: a\r\n"]],
        [b"POST /", *20 * [b"a"]],
        [b"GET /livez HTTP/1.1\r\n", *20 * [b"X"]],
        [*5 * [b"\r\n"], b"GET /livez HTTP/1.1\r\n", b"Host: x\r\n"],
        [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r"],
        [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\n", *20 * [b"X: a\r\n"]],
        [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"P", b"O", b"ST", *20 * [b" "]],
        [request(b"", H2C, first=b"GET /livez HTTP/1.1"), b"G"],
    ],
    ids=[
        "a byte",
        "a long header",
        "many headers",
        "a long path",
        "a header's name",
        "empty lines before",
        "no last byte",
        "pipelined",
        "a second request",
        "after an upgrade",
    ],
)
def test_slow_headers_are_given_up(server: RunningServer, pieces: list[bytes]) -> None:
    """However they drip: a second after their first byte or the connection's beginning."""
    before = count_of(server, "header_timeout")
    started = time.monotonic()
    with closing(connect(server)) as connection:
        connection.settimeout(0.1)
        received = b""
        for piece in [*pieces, *100 * [b""]]:
            try:
                connection.sendall(piece)
                piece = connection.recv(65536)
                received += piece
                if not piece:
                    break
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
        seconds = time.monotonic() - started
    assert re.search(rb"HTTP/1.1 408 .*connection: close.*GRAFT_HEADER_SECONDS", received, re.S)
    assert seconds >= HEADER_SECONDS
    assert count_of(server, "header_timeout") == before + 1


@pytest.mark.parametrize("sent", [b"", b"\r\n"], ids=["nothing", "an empty line"])
def test_a_connection_without_a_request_is_closed_without_an_answer(
    server: RunningServer, sent: bytes
) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(sent)
        assert read_rest(connection) == b""


def test_empty_lines_do_not_hold_a_connection(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        end = time.monotonic() + 60
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < end:
                time.sleep(0.1)
                connection.sendall(b"\r\n")
        assert time.monotonic() < end


@pytest.mark.alone
def test_an_idle_connection_waits_longer_than_headers_may_take(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        for _ in range(2):
            # Two reads' worth of headers, within their time.
            connection.sendall(PLAIN[:30])
            time.sleep(HEADER_SECONDS / 5)
            connection.sendall(PLAIN[30:] + IMAGE)
            assert is_red(read_answers(connection, 1)[0])
            time.sleep(2 * HEADER_SECONDS)


def test_a_slow_body_has_its_own_limit(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(PLAIN + IMAGE[:100])
        time.sleep(2 * HEADER_SECONDS)
        connection.sendall(IMAGE[100:])
        assert is_red(read_answers(connection, 1)[0])


def test_the_rest_of_a_body_that_was_answered_is_waited_for_as_headers_are(
    server: RunningServer,
) -> None:
    too_large = request(b"", JPEG, b"Content-Length: 2000001\r\n")
    for num_bytes in (2_000_001, 1000):
        with closing(connect(server)) as connection:
            connection.sendall(too_large)
            assert read_answers(connection, 1)[0][0] == 413
            connection.sendall(bytes(num_bytes))
            time.sleep(2 * HEADER_SECONDS)
            if num_bytes == 1000:
                assert connection.recv(1) == b""
            else:
                connection.sendall(PLAIN + IMAGE)
                assert is_red(read_answers(connection, 1)[0])


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"hello\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX Y: z\r\n\r\n",
        b"GET / livez HTTP/1.1\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: ten\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"GET /" + 70_000 * b"a" + b" HTTP/1.1\r\n\r\n",
    ],
    ids=[
        "TLS",
        "HTTP/2",
        "text",
        "version",
        "no colon",
        "space",
        "path",
        "CONNECT",
        "length",
        "two lengths",
        "long path",
    ],
)
def test_what_is_no_request_is_told_so(server: RunningServer, data: bytes) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(data)
        answer = read_rest(connection)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "bad_request"
    assert "not an HTTP/1.1 request" in error["message"]
    assert count_of(server, "bad_request") >= 1


def test_headers_have_a_size(server: RunningServer) -> None:
    before = count_of(server, "headers_too_large")
    with closing(connect(server)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        num_bytes = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while num_bytes < 1_000_000:
                connection.sendall(b"X: %s\r\n" % (1000 * b"a"))
                num_bytes += 1000
                time.sleep(0.001)
    assert num_bytes < 1_000_000
    assert count_of(server, "headers_too_large") == before + 1


def test_a_server_as_a_whole_says_what_it_takes(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(request(b"", b"Connection: close\r\n", first=b"OPTIONS * HTTP/1.1"))
        answer = read_rest(connection)
    assert answer.startswith(b"HTTP/1.1 204 No Content\r\n")
    assert b"\r\nallow: GET, HEAD, PATCH, POST\r\n" in answer


def test_the_server_never_failed(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert "Traceback" not in server.log()


def test_uvicorn_takes_its_default_from_the_table_that_is_changed() -> None:
    """Private interfaces of uvicorn 0.54."""
    importlib.import_module("service.app")
    assert HTTP_PROTOCOLS["auto"] == "service.web.connection:Connection"
    config = Config("service.app:ROUTES", log_config=None)
    config.load()
    assert config.http_protocol_class is Connection
