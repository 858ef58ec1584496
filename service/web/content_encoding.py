"""`Content-Encoding` of a request's body (RFC 9110, 8.4): gzip or deflate, undone on arrival.

Pieces are small, so that the reader counts them against its limits before there are more: 32 KB
may be 32 MB decompressed.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator

from service.errors import RequestError

ACCEPTED = "gzip, deflate"
# For `zlib.decompressobj`: gzip; zlib, which HTTP calls deflate; deflate without zlib's header,
# which some clients send.
_GZIP, _ZLIB, _BARE_DEFLATE = 31, 15, -15
_PIECE_BYTES = 64 * 2**10
_GZIP_MAGIC = b"\x1f\x8b"


def decode_content(chunks: AsyncIterator[bytes], content_encoding: str) -> AsyncIterator[bytes]:
    """The body as it was before its encoding, in pieces.

    Raises RequestError for an encoding that is not taken; while it is read, for data that are not
    encoded so, and for gzip that the header does not name.
    """
    encoding = content_encoding.strip().lower().removeprefix("x-")
    if encoding in ("", "identity"):
        return _check_plain(chunks)
    if encoding in ("gzip", "deflate"):
        return _decompress(chunks, encoding)
    raise RequestError(
        "unsupported_encoding",
        f"the body's Content-Encoding is {content_encoding[:50]!r}; send it as it is, or "
        "compressed once with gzip or deflate",
    )


async def _check_plain(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    is_first = True
    async for chunk in chunks:
        if is_first and chunk.startswith(_GZIP_MAGIC):
            raise RequestError(
                "unsupported_encoding",
                "the body is compressed with gzip and no header says so; send the header "
                "Content-Encoding: gzip with it, or the body as it is",
            )
        is_first = False
        yield chunk


async def _decompress(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    streams = _Streams(encoding)
    async for chunk in chunks:
        for piece in streams.decompress(chunk):
            yield piece
            # Other requests are answered between two pieces.
            await asyncio.sleep(0)
    if not streams.is_complete:
        raise _broken(encoding, "it ends too soon")


class _Streams:
    """The compressed streams of a body: one; of gzip there may be more (RFC 1952, 2.2)."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._stream: zlib._Decompress | None = None

    @property
    def is_complete(self) -> bool:
        return self._stream is None or self._stream.eof

    def decompress(self, data: bytes) -> Iterator[bytes]:
        """Pieces of at most `_PIECE_BYTES`; raises RequestError for data that are broken."""
        while data:
            stream = self._find_stream(data)
            try:
                piece = stream.decompress(data, _PIECE_BYTES)
                while len(piece) == _PIECE_BYTES:
                    yield piece
                    piece = stream.decompress(stream.unconsumed_tail, _PIECE_BYTES)
            except zlib.error as error:
                raise _broken(self._encoding, str(error)) from None
            if piece:
                yield piece
            data = stream.unused_data

    def _find_stream(self, data: bytes) -> zlib._Decompress:
        """The one that `data` continue, or a new one that they begin."""
        if self._stream is None or self._stream.eof:
            if self._encoding == "gzip":
                self._stream = zlib.decompressobj(_GZIP)
            elif self._stream is None:
                # The low half of zlib's first byte says 8, deflate (RFC 1950, 2.2).
                self._stream = zlib.decompressobj(_ZLIB if data[0] & 15 == 8 else _BARE_DEFLATE)
            else:
                raise _broken(self._encoding, "there are data behind its end")
        return self._stream


def _broken(encoding: str, reason: str) -> RequestError:
    return RequestError(
        "broken_encoding",
        f"the body is not whole {encoding}, which its Content-Encoding says ({reason}); send all "
        "of it, or send it uncompressed",
    )
