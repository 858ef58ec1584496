"""Base64 as clients write it, and what is none."""

from __future__ import annotations

import base64
import re

import pytest

from service.errors import RequestError
from service.protocols.shared import decode_base64

# In base64 it has both characters that differ in the URL-safe alphabet, and padding.
DATA = b"\xfb\xff\xbf" + b"an image" * 30
TEXT = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        URL_SAFE,
        URL_SAFE.rstrip("="),
        base64.encodebytes(DATA).decode(),
        base64.encodebytes(DATA).decode().replace("\n", "\r\n").rstrip("=\r\n"),
        f"  {TEXT}\t ",
        f"data:image/jpeg;base64,{TEXT}",
        f"data:image/jpeg;base64,{TEXT.rstrip('=')}",
        f"data:;base64,{URL_SAFE}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:image/png;name=a.png;charset=utf-8;base64,{TEXT}",
        f"data:image/png; base64 ,{TEXT}",
        "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        f"data:image/jpeg;base64,\n{TEXT}\n",
    ],
    ids=[
        "standard",
        "unpadded",
        "URL-safe",
        "URL-safe, unpadded",
        "wrapped",
        "wrapped, unpadded",
        "spaces around",
        "data:",
        "data:, unpadded",
        "data: without a type, URL-safe",
        "data: in capitals",
        "data: with parameters",
        "data: with spaces",
        "data:, percent-encoded",
        "data:, wrapped",
    ],
)
def test_base64_in_any_form(text: str) -> None:
    assert decode_base64(text, "inputs") == DATA


@pytest.mark.parametrize("num_bytes", range(8))
def test_every_length_with_and_without_padding(num_bytes: int) -> None:
    data = DATA[:num_bytes]
    text = base64.b64encode(data).decode()
    assert decode_base64(text, "inputs") == decode_base64(text.rstrip("="), "inputs") == data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://localhost/a.jpg", "URLs are not fetched"),
        ("file:///etc/passwd", "not base64"),
        ("photo.jpg", "not base64"),
        ("a", "not base64"),
        ("TEXT=TEXT", "not base64"),
        ("кот", "not base64"),
        (TEXT + "!", "not base64"),
        ("data:image/png,%89PNG", "does not say ';base64,'"),
        ("data:image/png;base64", "does not say ';base64,'"),
        ("data:", "does not say ';base64,'"),
        ("data:image/png;base64,http://localhost/a.jpg", "not base64"),
        ("data:image/png;base64;utf8,TEXT", "does not say ';base64,'"),
    ],
)
def test_what_is_none(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape('inputs[3]')} .*{re.escape(words)}"):
        decode_base64(text, "inputs[3]")
