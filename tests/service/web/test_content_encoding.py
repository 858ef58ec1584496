"""Compressed bodies are what they were before, in pieces; what is none is refused in words."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib
from collections.abc import AsyncIterator

import pytest

from service.errors import RequestError
from service.web.content_encoding import decode_content

TEXT = b"an image, " * 1000
# Does not compress.
NOISE = random.Random(0).randbytes(300_000)
ZEROS = bytes(5_000_000)


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def decode(body: bytes, encoding: str, chunk_bytes: int = 65536) -> list[bytes]:
    """The pieces."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), chunk_bytes):
            yield body[start : start + chunk_bytes]
        # Starlette ends every body with an empty chunk.
        yield b""

    async def read() -> list[bytes]:
        return [piece async for piece in decode_content(chunks(), encoding)]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("encoding", "body", "expected"),
    [
        ("", TEXT, TEXT),
        ("identity", TEXT, TEXT),
        ("gzip", gzip.compress(TEXT), TEXT),
        ("x-gzip", gzip.compress(TEXT), TEXT),
        (" GZIP ", gzip.compress(TEXT), TEXT),
        ("gzip", gzip.compress(NOISE), NOISE),
        ("gzip", gzip.compress(NOISE, 0), NOISE),
        ("gzip", gzip.compress(ZEROS), ZEROS),
        ("gzip", gzip.compress(bytes(65536)), bytes(65536)),
        ("gzip", gzip.compress(b""), b""),
        ("gzip", b"", b""),
        ("gzip", gzip.compress(TEXT) + gzip.compress(NOISE), TEXT + NOISE),
        ("deflate", zlib.compress(TEXT), TEXT),
        ("deflate", zlib.compress(ZEROS), ZEROS),
        ("deflate", zlib.compress(NOISE, 0), NOISE),
        ("deflate", bare_deflate(TEXT), TEXT),
        ("deflate", bare_deflate(NOISE), NOISE),
        ("deflate", bare_deflate(b""), b""),
    ],
    ids=[
        "plain",
        "identity",
        "gzip",
        "x-gzip",
        "capitals",
        "noise",
        "stored",
        "zeros",
        "one piece",
        "nothing compressed",
        "nothing",
        "two members",
        "deflate",
        "deflated zeros",
        "deflate stored",
        "bare deflate",
        "bare noise",
        "bare nothing",
    ],
)
@pytest.mark.parametrize("num_chunks", [1, 5, 3000])
def test_a_body_is_what_it_was(
    encoding: str, body: bytes, expected: bytes, num_chunks: int
) -> None:
    pieces = decode(body, encoding, max(1, len(body) // num_chunks))
    assert b"".join(pieces) == expected
    assert encoding in ("", "identity") or max(map(len, pieces), default=0) <= 65536


@pytest.mark.parametrize(
    ("encoding", "body", "code", "words"),
    [
        ("br", TEXT, "unsupported_encoding", "'br'"),
        ("zstd", TEXT, "unsupported_encoding", "gzip or deflate"),
        ("compress", TEXT, "unsupported_encoding", "'compress'"),
        ("gzip, gzip", gzip.compress(gzip.compress(TEXT)), "unsupported_encoding", "once"),
        ("", gzip.compress(TEXT), "unsupported_encoding", "no header says so"),
        ("identity", gzip.compress(TEXT), "unsupported_encoding", "Content-Encoding: gzip"),
        ("gzip", TEXT, "broken_encoding", "incorrect header"),
        ("gzip", b"\x1f", "broken_encoding", "too soon"),
        ("gzip", gzip.compress(NOISE)[:-1], "broken_encoding", "too soon"),
        ("gzip", gzip.compress(NOISE)[:1000], "broken_encoding", "too soon"),
        ("gzip", gzip.compress(TEXT)[:-8] + bytes(8), "broken_encoding", "check"),
        ("gzip", gzip.compress(TEXT) + b"more", "broken_encoding", "incorrect header"),
        ("gzip", zlib.compress(TEXT), "broken_encoding", "gzip"),
        ("deflate", gzip.compress(TEXT), "broken_encoding", "deflate"),
        ("deflate", zlib.compress(TEXT) + b"more", "broken_encoding", "behind"),
        ("deflate", zlib.compress(TEXT)[:9], "broken_encoding", "too soon"),
        ("deflate", b"\xff\xd8\xff\xe0", "broken_encoding", "deflate"),
    ],
)
def test_what_is_refused(encoding: str, body: bytes, code: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        decode(body, encoding)
    assert refused.value.code == code


def test_a_bomb_is_read_no_further_than_its_reader_goes() -> None:
    """A gigabyte in a megabyte: three pieces of it are three pieces of work."""

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield packer.compress(bytes(64 * 2**20))

    async def read() -> list[bytes]:
        pieces = []
        async for piece in decode_content(chunks(), "gzip"):
            pieces.append(piece)
            if len(pieces) == 3:
                break
        return pieces

    packer = zlib.compressobj(wbits=31)
    assert [len(piece) for piece in asyncio.run(read())] == 3 * [65536]
