"""Forms as clients write them are split at the right places, and refused where broken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from service.errors import RequestError
from service.web.uploads import NamedImage, Upload, _may_be_image, read_form
from tests.support.images import draw_image

MAX_IMAGES = 3
HEAD = b'Content-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
OPTION_HEAD = b'Content-Disposition: form-data; name="top_k"\r\n\r\n'
OPTION = b"--b\r\n" + OPTION_HEAD


def parse(body: bytes, boundary: bytes = b"b", chunk_bytes: int = 65536) -> Upload:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), chunk_bytes):
            yield body[start : start + chunk_bytes]

    return asyncio.run(read_form(chunks(), boundary, MAX_IMAGES))


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"",
        b"\r\n",
        b"\r\n\r\n--",
        b" --b",
        b"\n--b--\n",
        b"\r\n-b\r\n--",
        bytes(range(256)) * 300,
    ],
    ids=[
        "a byte",
        "nothing",
        "a line",
        "dashes",
        "boundary in a line",
        "boundary after a newline alone",
        "near",
        "long",
    ],
)
@pytest.mark.parametrize(
    "head",
    [HEAD, HEAD + b"Content-Type: image/jpeg\r\n", b"X-Other:\r\n" + HEAD.lower()],
    ids=["plain", "type", "lower"],
)
@pytest.mark.parametrize("chunk_bytes", [65536, 1000, 1], ids=["whole", "in chunks", "in bytes"])
def test_an_image_is_what_stands_between_its_headers_and_the_next_boundary(
    head: bytes, data: bytes, chunk_bytes: int
) -> None:
    for before, after in ((b"", b""), (b"\r\n", b"\r\n"), (b"", b"\r\nan epilogue\r\n--b\r\n")):
        image = b"--b\r\n" + head + b"\r\n" + data + b"\r\n"
        body = before + image + b"--b \t\r\n" + OPTION_HEAD + b"7\r\n--b--" + after
        expected = Upload([NamedImage("a.jpg", data)], {"top_k": "7"})
        assert parse(body, chunk_bytes=chunk_bytes) == expected


def test_images_keep_their_order_and_their_names() -> None:
    typed = b'Content-Disposition: form-data; name="images"\r\nContent-Type: image/png\r\n'
    nothing_chosen = (
        b'Content-Disposition: form-data; name="images"; filename=""\r\n'
        b"Content-Type: application/octet-stream\r\n"
    )
    body = b"".join(
        b"--b\r\n" + head + b"\r\n" + data + b"\r\n"
        for head, data in ((typed, b"1"), (nothing_chosen, b""), (HEAD, b"2"))
    )
    assert parse(body + b"--b--").images == [NamedImage("image 1", b"1"), NamedImage("a.jpg", b"2")]


def test_a_form_without_parts_is_empty() -> None:
    assert parse(b"--b--") == Upload()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"--b", "broken_multipart"),
        (b"--bc\r\n" + HEAD + b"\r\nx\r\n--b--", "broken_multipart"),
        (b"--b\r\n" + HEAD, "broken_multipart"),
        (b"--b\r\n\r\nx\r\n--b--", "unknown_field"),
        (b"--b\r\nContent Disposition: form-data\r\n\r\nx\r\n--b--", "broken_multipart"),
        (b"--b\r\nContent-Disposition\r\n\r\nx\r\n--b--", "broken_multipart"),
        (b"--b\r\n" + 9 * b"X-Other: x\r\n" + HEAD + b"\r\nx\r\n--b--", "broken_multipart"),
        (2 * (OPTION + b"7\r\n") + b"--b--", "bad_parameter"),
        (OPTION + b"7" * 2000 + b"\r\n--b--", "bad_parameter"),
        (4 * (b"--b\r\n" + HEAD + b"\r\nx\r\n") + b"--b--", "too_many_images"),
        (
            8 * (b"--b\r\n" + HEAD.replace(b"a.jpg", b"") + b"\r\n\r\n") + b"--b--",
            "too_many_images",
        ),
    ],
    ids=[
        "cut",
        "longer",
        "no end",
        "no headers",
        "space",
        "no colon",
        "many headers",
        "twice",
        "long",
        "images",
        "empty images",
    ],
)
def test_what_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(body)
    assert refused.value.code == code


def test_a_body_of_boundaries_costs_no_more_than_its_first_part() -> None:
    with pytest.raises(RequestError, match="has a field ''"):
        parse(b"--b\r\n\r\n" + b"\r\n--b\r\n\r\n" * 1_000_000)


@pytest.mark.alone
@pytest.mark.parametrize(
    "data", [b"\r\n--bX", b"\r\n--b-X", b"\r\n-", b"\r"], ids=["longer", "dash", "near", "returns"]
)
def test_one_chunk_of_what_is_nearly_a_boundary_does_not_hold_the_event_loop(data: bytes) -> None:
    """uvicorn gives chunks of at most 64 KB; other requests are served between two of them."""
    body = b"--b\r\n" + HEAD + b"\r\n" + data * (65_000 // len(data)) + b"\r\n--b--"
    started = time.perf_counter()
    assert len(parse(body).images) == 1
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'form-data; name="images"; filename="a;b=\\"c.jpg"', 'a;b="c.jpg'),
        (b"Form-Data ;NAME=images ; filename=a.jpg", "a.jpg"),
        (b'form-data; filename="C:\\photos\\a.jpg"; name="images"', "a.jpg"),
        (b'form-data; name="images"; filename*=UTF-8\'\'b.jpg; filename="a.jpg"', "a.jpg"),
        ('form-data; name="images"; filename="Größe.jpg"'.encode(), "Größe.jpg"),
        (b'form-data; name="images"; filename="a.jpg', '"a.jpg'),
        (b"form-data; name=\"images\"; filename*=utf-8''%D0%BA%D0%BE%D1%82.jpg", "кот.jpg"),
        (b"form-data; name=\"images\"; FileName*=UTF-8'ru'%D0%BA%D0%BE%D1%82.jpg", "кот.jpg"),
        (b"form-data; name=\"images\"; filename*=iso-8859-1''Gr%F6%DFe.jpg", "Größe.jpg"),
        (b"form-data; name=\"images\"; filename*=klingon''a.jpg", "a.jpg"),
        (b"form-data; name=\"images\"; filename*=UTF-8''a%3Bb%22c.jpg", 'a;b"c.jpg'),
        (b'form-data; name="images"; filename*="UTF-8\'\'a.jpg"', "a.jpg"),
        (b'form-data; name="images"; filename*=a.jpg', "a.jpg"),
        (b'form-data; name="images"; filename*0="a"; filename*1="b.jpg"', "ab.jpg"),
        (b"form-data; name=\"images\"; filename*0*=UTF-8''%D0%BA; filename*1=b.jpg", "кb.jpg"),
        (b"form-data; name*=UTF-8''images; filename=\"a.jpg\"", "a.jpg"),
        (b"form-data; name*=UTF-8''%69mages; filename*=UTF-8''a.jpg", "a.jpg"),
        (b"form-data; filename*=UTF-8''a.jpg; name=images", "a.jpg"),
        (b"form-data; name=images; filename=a.jpg; filename*=utf-8''b.jpg", "a.jpg"),
        (b'form-data; name="images"; filename="=?UTF-8?B?0LrQvtGC?="', "=?UTF-8?B?0LrQvtGC?="),
        (b'form-data; name="images"; filename="a*b.jpg"', "a*b.jpg"),
        (b'form-data; name="images"; filename="%22a%22.jpg"', "%22a%22.jpg"),
        (b'form-data; name="images"; filename="a\\\\b.jpg"', "a\\b.jpg"),
        (b'form-data; name="images"; filename="\xff.jpg"', "\ufffd.jpg"),
        (b'form-data; name="images"; filename="/home/me/a.jpg"', "/home/me/a.jpg"),
        (b"form-data; name=\"images\"; filename*=undefined''a.jpg", "a.jpg"),
        (b"form-data; name=\"images\"; filename*=idna''%F6.jpg", "\ufffd.jpg"),
        (b"form-data; name=\"images\"; filename*=punycode''%F6.jpg", "\ufffd.jpg"),
        (b"form-data; name=\"images\"; filename*=unicode_escape''%5Cud800.jpg", "\\ud800.jpg"),
        (b"form-data; name=\"images\"; filename*=utf-16''%00%D8.jpg", "\x00\ufffd.jpg"),
        (b"form-data; name=\"images\"; filename*=utf-8''%ED%A0%80.jpg", "\ufffd\ufffd\ufffd.jpg"),
        (b"form-data; name=\"images\"; filename*=\x00''a.jpg", "a.jpg"),
        (b'form-data; name="images"; filename*=a.jpg; filename*0=b.jpg', "image 1"),
    ],
    ids=[
        "quoted",
        "bare",
        "windows",
        "both",
        "utf-8",
        "cut short",
        "extended",
        "with a language",
        "latin-1",
        "unknown charset",
        "escaped",
        "quoted extended",
        "no charset",
        "continued",
        "continued and extended",
        "extended name",
        "extended and escaped name",
        "extended before the name",
        ".NET",
        "RFC 2047",
        "star",
        "percent",
        "backslash",
        "not utf-8",
        "path",
        "undefined",
        "idna",
        "punycode",
        "escapes",
        "utf-16",
        "half a pair",
        "NUL as charset",
        "numbered and not",
    ],
)
def test_names_as_clients_write_them(disposition: bytes, name: str) -> None:
    body = b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\nx\r\n--b--"
    assert parse(body).images == [NamedImage(name, b"x")]


def test_a_text_without_a_file_name_is_no_file() -> None:
    head = b"Content-Disposition: form-data; name=\"images\"; other*=UTF-8''a.jpg\r\n"
    with pytest.raises(RequestError, match="holds text, not a file"):
        parse(b"--b\r\n" + head + b"\r\nx\r\n--b--")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_images_of_all_formats_are_told_from_text(kind: str) -> None:
    data = draw_image("red", kind=kind)
    assert _may_be_image(data)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"images": []}', b"model=colors", b"--b\r\n\r\n", "größer".encode()]
)
def test_text_is_no_image(data: bytes) -> None:
    assert not _may_be_image(data)
