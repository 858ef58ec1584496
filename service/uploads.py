"""A request's body → images and options, with every limit kept while it is read. Text is never taken for a URL to fetch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.errors import RequestError
from service.settings import Settings

IMAGES_FIELD = "images"
OPTION_FIELDS = ("model", "version", "top_k")
_MAX_OPTION_BYTES = 1024
_MAX_HEADER_BYTES = 4096
_HOW_TO_SEND = (
    "send multipart/form-data with one or more files in the field 'images' (curl -F images=@photo.jpg), "
    "or one image as the body (curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg')"
)


@dataclass(frozen=True)
class NamedImage:
    """An encoded image and the name to call it by in an error."""

    name: str
    data: bytes


@dataclass
class Upload:
    """What a request holds: its images in order, and its options as text."""

    images: list[NamedImage] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


class Buffered:
    """How many bytes of bodies this process holds; beyond the limit requests are refused, so that memory stays bounded."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        hold = Hold(self)
        try:
            yield hold
        finally:
            self.num_bytes -= hold.num_bytes

    def add(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self._max_bytes:
            raise RequestError("overloaded", "too many large requests are being sent; try again in 1 s", retry_after_seconds=1)
        self.num_bytes += num_bytes


class Hold:
    """One request's share of what is buffered, given back when it ends."""

    def __init__(self, buffered: Buffered) -> None:
        self._buffered = buffered
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._buffered.add(num_bytes)
        self.num_bytes += num_bytes


async def read_upload(request: Request, settings: Settings, hold: Hold) -> Upload:
    """Read a multipart or a raw image body. Raises RequestError with what to do, and ClientDisconnect where the client left."""
    content_type, parameters = parse_options_header(request.headers.get("content-type"))
    chunks = _read_chunks(request, settings, hold)
    try:
        async with asyncio.timeout(settings.body_seconds):
            if content_type == b"multipart/form-data":
                upload = await _read_multipart(chunks, parameters.get(b"boundary", b""), settings)
            elif content_type.startswith(b"image/") or content_type == b"application/octet-stream":
                upload = await _read_raw(chunks)
            else:
                shown = content_type.decode("latin-1") or "missing"
                raise RequestError("unsupported_content_type", f"the content type is {shown}: {_HOW_TO_SEND}")
    except TimeoutError:
        raise _body_timeout(settings) from None
    for name in OPTION_FIELDS:
        if name in request.query_params:
            upload.options.setdefault(name, request.query_params[name])
    if not upload.images:
        raise RequestError("no_image", f"the request has no image: {_HOW_TO_SEND}")
    return upload


async def read_body(request: Request, settings: Settings, hold: Hold) -> bytes:
    """The whole body of a protocol that has its images in JSON. Raises RequestError where it is too large or does not come."""
    try:
        async with asyncio.timeout(settings.body_seconds):
            return b"".join([chunk async for chunk in _read_chunks(request, settings, hold)])
    except TimeoutError:
        raise _body_timeout(settings) from None


def too_many_images(max_images: int) -> RequestError:
    return RequestError(
        "too_many_images", f"the request has more than {max_images} images (GRAFT_MAX_IMAGES); send them in several requests"
    )


def _body_timeout(settings: Settings) -> RequestError:
    return RequestError("body_timeout", f"the body did not arrive within {settings.body_seconds:g} s")


async def _read_chunks(request: Request, settings: Settings, hold: Hold) -> AsyncIterator[bytes]:
    """The body piece by piece: refused by its Content-Length before a byte is read, by its true size where there is none."""
    announced = request.headers.get("content-length", "")
    num_bytes = int(announced) if announced.isascii() and announced.isdigit() else 0
    received = 0
    if num_bytes > settings.max_body_bytes:
        raise _body_too_large(settings)
    async for chunk in request.stream():
        received += len(chunk)
        if received > settings.max_body_bytes:
            raise _body_too_large(settings)
        hold.add(len(chunk))
        yield chunk


def _body_too_large(settings: Settings) -> RequestError:
    return RequestError(
        "body_too_large",
        f"the body is larger than {settings.max_body_bytes} bytes (GRAFT_MAX_BODY_BYTES); send fewer or smaller images",
    )


async def _read_raw(chunks: AsyncIterator[bytes]) -> Upload:
    data = b"".join([chunk async for chunk in chunks])
    return Upload([NamedImage("the image", data)] if data else [])


async def _read_multipart(chunks: AsyncIterator[bytes], boundary: bytes, settings: Settings) -> Upload:
    form = _Form(boundary, settings)
    try:
        async for chunk in chunks:
            form.parser.write(chunk)
    except FormParserError as error:
        raise RequestError("broken_multipart", f"the multipart body cannot be read ({error}): {_HOW_TO_SEND}") from None
    finally:
        # The form and its parser hold each other, and would hold the images until the garbage collector comes.
        form.parser.callbacks = {}
    if not form.is_complete:
        raise RequestError("broken_multipart", f"the multipart body ends before its last boundary: {_HOW_TO_SEND}")
    return form.upload


class _Form:
    """Collects the parts that the parser calls back with, and refuses what is not asked for as soon as it is seen."""

    def __init__(self, boundary: bytes, settings: Settings) -> None:
        if not boundary:
            raise RequestError("broken_multipart", f"the Content-Type header names no boundary: {_HOW_TO_SEND}")
        self.upload = Upload()
        self.is_complete = False
        self._max_images = settings.max_images
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._field = ""
        self._file_name: str | None = None
        self._data: list[bytes] = []
        self._num_option_bytes = 0
        try:
            self.parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
                max_header_size=_MAX_HEADER_BYTES,
            )
        except FormParserError as error:
            raise RequestError("broken_multipart", f"{error}: {_HOW_TO_SEND}") from None

    def _on_part_begin(self) -> None:
        self._headers, self._data = {}, []

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition"))
        self._field = parameters.get(b"name", b"").decode("utf-8", "replace")
        content_type = self._headers.get(b"content-type", b"")
        if b"filename" in parameters:
            self._file_name = parameters[b"filename"].decode("utf-8", "replace")
        else:
            # Some clients give a part its type and no file name.
            self._file_name = "" if content_type.startswith((b"image/", b"application/octet-stream")) else None
        self._check_part()

    def _check_part(self) -> None:
        if self._field not in (IMAGES_FIELD, *OPTION_FIELDS):
            raise RequestError(
                "unknown_field",
                f"the form has a field {self._field[:100]!r}; its fields are 'images' (files), 'model', 'version' and 'top_k'",
            )
        if self._field == IMAGES_FIELD and self._file_name is None:
            raise RequestError(
                "no_image",
                "the field 'images' holds text, not a file; send the file itself "
                "(curl -F images=@photo.jpg, with the @): addresses are not fetched",
            )
        if self._field == IMAGES_FIELD and len(self.upload.images) >= self._max_images:
            raise too_many_images(self._max_images)
        if self._field != IMAGES_FIELD and self._field in self.upload.options:
            raise RequestError("bad_parameter", f"the field {self._field!r} is there twice; send it once")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field != IMAGES_FIELD:
            self._num_option_bytes += end - start
            if self._num_option_bytes > _MAX_OPTION_BYTES:
                raise RequestError("bad_parameter", f"the field {self._field!r} is longer than {_MAX_OPTION_BYTES} bytes")
        self._data.append(data[start:end])

    def _on_part_end(self) -> None:
        data = b"".join(self._data)
        self._data = []
        if self._field != IMAGES_FIELD:
            self.upload.options[self._field] = _plain_text(data.decode("utf-8", "replace"))
        # A browser sends one empty part without a name where no file was chosen.
        elif data or self._file_name:
            number = len(self.upload.images) + 1
            self.upload.images.append(NamedImage((self._file_name or f"image {number}")[:100], data))

    def _on_end(self) -> None:
        self.is_complete = True


def _plain_text(text: str) -> str:
    """BentoML's client writes form values as JSON, so a text comes in quotes."""
    if text.startswith('"') and text.endswith('"'):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text
