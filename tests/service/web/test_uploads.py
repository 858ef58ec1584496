"""A form as clients write it: taken to pieces at the right places, and refused where it is none."""

from __future__ import annotations

import pytest

from service.errors import RequestError
from service.settings import Settings
from service.web.uploads import NamedImage, Upload, parse_form

SETTINGS = Settings(max_images=3)
HEAD = b'Content-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
OPTION = b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n'


def parse(body: bytes, boundary: bytes = b"b") -> Upload:
    return parse_form(body, boundary, SETTINGS)


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
def test_an_image_is_what_stands_between_its_headers_and_the_next_boundary(
    head: bytes, data: bytes
) -> None:
    for before, after in (
        (b"", b""),
        (b"a preamble\r\n", b"\r\nan epilogue\r\n--b\r\n"),
        (b"\r\n", b"\r\n"),
    ):
        body = (
            before
            + b"--b \t\r\n"
            + head
            + b"\r\n"
            + data
            + b"\r\n"
            + OPTION
            + b"7\r\n--b--"
            + after
        )
        assert parse(body) == Upload([NamedImage("a.jpg", data)], {"top_k": "7"})


def test_images_keep_their_order_and_the_names_that_they_have() -> None:
    typed = b'Content-Disposition: form-data; name="images"\r\nContent-Type: image/png\r\n'
    nothing_chosen = b'Content-Disposition: form-data; name="images"; filename=""\r\nContent-Type: application/octet-stream\r\n'
    body = b"".join(
        b"--b\r\n" + head + b"\r\n" + data + b"\r\n"
        for head, data in ((typed, b"1"), (nothing_chosen, b""), (HEAD, b"2"))
    )
    assert parse(body + b"--b--").images == [NamedImage("image 1", b"1"), NamedImage("a.jpg", b"2")]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"--b--", None),
        (b"--b", "broken_multipart"),
        (b"--bc\r\n" + HEAD + b"\r\nx\r\n--b--", "broken_multipart"),
        (b"--b\r\n" + HEAD, "broken_multipart"),
        (b"--b\r\n\r\nx\r\n--b--", "unknown_field"),
        (b"--b\r\nContent Disposition: form-data\r\n\r\nx\r\n--b--", "broken_multipart"),
        (b"--b\r\nContent-Disposition\r\n\r\nx\r\n--b--", "broken_multipart"),
        (2 * (OPTION + b"7\r\n") + b"--b--", "bad_parameter"),
        (OPTION + b"7" * 2000 + b"\r\n--b--", "bad_parameter"),
        (4 * (b"--b\r\n" + HEAD + b"\r\nx\r\n") + b"--b--", "too_many_images"),
        (
            8 * (b"--b\r\n" + HEAD.replace(b"a.jpg", b"") + b"\r\n\r\n") + b"--b--",
            "too_many_images",
        ),
    ],
    ids=[
        "empty",
        "cut",
        "longer",
        "no end",
        "no headers",
        "space",
        "no colon",
        "twice",
        "long",
        "images",
        "empty images",
    ],
)
def test_what_is_refused(body: bytes, code: str | None) -> None:
    if code is None:
        assert parse(body) == Upload()
        return
    with pytest.raises(RequestError) as refused:
        parse(body)
    assert refused.value.code == code


def test_a_body_of_boundaries_costs_no_more_than_its_first_part() -> None:
    with pytest.raises(RequestError, match="has a field ''"):
        parse(b"--b\r\n\r\n" + b"\r\n--b\r\n\r\n" * 1_000_000)


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'form-data; name="images"; filename="a;b=\\"c.jpg"', 'a;b="c.jpg'),
        (b"Form-Data ;NAME=images ; filename=a.jpg", "a.jpg"),
        (b'form-data; filename="C:\\photos\\a.jpg"; name="images"', "C:\\photos\\a.jpg"),
        (b'form-data; name="images"; filename*=UTF-8\'\'b.jpg; filename="a.jpg"', "a.jpg"),
        ('form-data; name="images"; filename="Größe.jpg"'.encode(), "Größe.jpg"),
        (b'form-data; name="images"; filename="a.jpg', "a.jpg"),
    ],
    ids=["quoted", "bare", "windows", "extended", "utf-8", "cut short"],
)
def test_names_as_clients_write_them(disposition: bytes, name: str) -> None:
    body = b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\nx\r\n--b--"
    assert parse(body).images == [NamedImage(name, b"x")]
