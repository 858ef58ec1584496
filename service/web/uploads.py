"""A request's body → images and options, with every limit kept while it is read. Text is never taken for a URL to fetch."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.requests import Request

from service.errors import RequestError
from service.inference.memory_budget import Reservation
from service.settings import Settings

IMAGES_FIELD = "images"
OPTION_FIELDS = ("model", "version", "top_k")
_MAX_OPTION_BYTES = 1024
_MAX_HEADER_BYTES = 4096
_MAX_BOUNDARY_BYTES = 256
_HEADER_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,100}")  # a token of RFC 9110
# `; name=value` or `; name="value"`, whose quotes and backslashes may be escaped (RFC 9110, 5.6.6). A quote that is not closed goes on
# to the end and nothing is tried twice, so that no value takes longer than its length.
_PARAMETER = re.compile(
    rb';[ \t]*([^\s;="]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*+)\\?(?:"|\Z)|((?!")[^;]*))', re.DOTALL
)
_ESCAPED = re.compile(rb'\\(["\\])')
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


async def read_upload(request: Request, settings: Settings, reservation: Reservation) -> Upload:
    """Read a multipart or a raw image body. Raises RequestError with what to do, and ClientDisconnect where the client left."""
    content_type, parameters = parse_parameters(
        request.headers.get("content-type", "").encode("latin-1")
    )
    chunks = _read_chunks(request, settings, reservation)
    try:
        async with asyncio.timeout(settings.body_seconds):
            if content_type == b"multipart/form-data":
                upload = parse_form(await _join(chunks), parameters.get(b"boundary", b""), settings)
            elif content_type.startswith(b"image/") or content_type == b"application/octet-stream":
                data = await _join(chunks)
                upload = Upload([NamedImage("the image", data)] if data else [])
            else:
                shown = content_type.decode("latin-1") or "missing"
                raise RequestError(
                    "unsupported_content_type", f"the content type is {shown}: {_HOW_TO_SEND}"
                )
    except TimeoutError:
        raise _body_timeout(settings) from None
    for name in OPTION_FIELDS:
        if name in request.query_params:
            upload.options.setdefault(name, request.query_params[name])
    if not upload.images:
        raise RequestError("no_image", f"the request has no image: {_HOW_TO_SEND}")
    return upload


async def read_body(request: Request, settings: Settings, reservation: Reservation) -> bytes:
    """The whole body of a protocol that has its images in JSON. Raises RequestError where it is too large or does not come."""
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _join(_read_chunks(request, settings, reservation))
    except TimeoutError:
        raise _body_timeout(settings) from None


def too_many_images(max_images: int) -> RequestError:
    return RequestError(
        "too_many_images",
        f"the request has more than {max_images} images (GRAFT_MAX_IMAGES); send them in several requests",
    )


def _body_timeout(settings: Settings) -> RequestError:
    return RequestError(
        "body_timeout", f"the body did not arrive within {settings.body_seconds:g} s"
    )


async def _read_chunks(
    request: Request, settings: Settings, reservation: Reservation
) -> AsyncIterator[bytes]:
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
        reservation.add(len(chunk))
        yield chunk


async def _join(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def _body_too_large(settings: Settings) -> RequestError:
    return RequestError(
        "body_too_large",
        f"the body is larger than {settings.max_body_bytes} bytes (GRAFT_MAX_BODY_BYTES); send fewer or smaller images",
    )


class _Form:
    """The parts of a form, and the refusal of what is not asked for as soon as it is seen."""

    def __init__(self, settings: Settings) -> None:
        self.upload = Upload()
        self._max_images = settings.max_images
        self._num_parts_left = settings.max_images + len(OPTION_FIELDS) + 1
        self._num_option_bytes = 0

    def add(self, headers: bytes, data: bytes) -> None:
        self._num_parts_left -= 1
        if self._num_parts_left < 0:
            raise too_many_images(self._max_images)
        fields = dict(_split_header(line) for line in headers.split(b"\r\n")) if headers else {}
        _, parameters = parse_parameters(fields.get(b"content-disposition", b""))
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in parameters:
            file_name: str | None = parameters[b"filename"].decode("utf-8", "replace")
        else:
            # Some clients give a part its type and no file name.
            is_file = fields.get(b"content-type", b"").startswith(
                (b"image/", b"application/octet-stream")
            )
            file_name = "" if is_file else None
        if name == IMAGES_FIELD:
            self._add_image(file_name, data)
        elif name in OPTION_FIELDS:
            self._add_option(name, data)
        else:
            raise RequestError(
                "unknown_field",
                f"the form has a field {name[:100]!r}; its fields are 'images' (files), 'model', 'version' and 'top_k'",
            )

    def _add_image(self, file_name: str | None, data: bytes) -> None:
        if file_name is None:
            raise RequestError(
                "no_image",
                "the field 'images' holds text, not a file; send the file itself "
                "(curl -F images=@photo.jpg, with the @): addresses are not fetched",
            )
        number = len(self.upload.images) + 1
        if number > self._max_images:
            raise too_many_images(self._max_images)
        # A browser sends one empty part without a name where no file was chosen.
        if data or file_name:
            self.upload.images.append(NamedImage((file_name or f"image {number}")[:100], data))

    def _add_option(self, name: str, data: bytes) -> None:
        if name in self.upload.options:
            raise RequestError("bad_parameter", f"the field {name!r} is there twice; send it once")
        self._num_option_bytes += len(data)
        if self._num_option_bytes > _MAX_OPTION_BYTES:
            raise RequestError(
                "bad_parameter", f"the field {name!r} is longer than {_MAX_OPTION_BYTES} bytes"
            )
        self.upload.options[name] = _plain_text(data.decode("utf-8", "replace"))


def parse_form(body: bytes, boundary: bytes, settings: Settings) -> Upload:
    """A whole multipart body (RFC 2046, 5.1.1; RFC 7578). A part is searched for at a time, so that a body of delimiters costs no more
    than its first part that is refused. A parser that is fed piece by piece took four times as long, a tenth of a request's Python.
    """
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise _broken_multipart(
            f"the Content-Type header has a boundary of {len(boundary)} bytes, 1 to {_MAX_BOUNDARY_BYTES} are allowed"
        )
    form = _Form(settings)
    delimiter = b"\r\n--" + boundary
    # The first one needs no line before it.
    at = len(delimiter) - 2 if body.startswith(delimiter[2:]) else _after(body, delimiter, 0)
    while body[at : at + 2] != b"--":
        headers_at = body.find(b"\r\n", at)
        if headers_at < 0 or body[at:headers_at].strip(b" \t"):
            raise _broken_multipart("a boundary is not at the end of its line")
        # Its headers may be none: then the line's end is the empty line's, too.
        data_at = body.find(b"\r\n\r\n", headers_at, headers_at + _MAX_HEADER_BYTES)
        if data_at < 0:
            raise _broken_multipart(
                f"the headers of a part do not end within {_MAX_HEADER_BYTES} bytes"
            )
        at = _after(body, delimiter, data_at + 2)
        form.add(body[headers_at + 2 : data_at], body[data_at + 4 : at - len(delimiter)])
    return form.upload


def _after(body: bytes, delimiter: bytes, start: int) -> int:
    found = body.find(delimiter, start)
    if found < 0:
        raise _broken_multipart(
            "it ends before its last boundary" if start else "its boundary is not in it"
        )
    return found + len(delimiter)


def _split_header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not _HEADER_NAME.fullmatch(name):
        raise _broken_multipart(f"a part has the header {line[:40]!r}")
    return name.lower(), value.strip(b" \t")


def parse_parameters(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """`form-data; name="images"; filename="a.jpg"` → the first word in small letters, and the parameters. Browsers escape a quote in a
    name as %22 or with a backslash, and other backslashes, of Windows' paths, not at all."""
    word, _, rest = value.partition(b";")
    parameters = {}
    for name, quoted, plain in _PARAMETER.findall(b";" + rest):
        parameters[name.lower()] = _ESCAPED.sub(rb"\1", quoted) if quoted else plain.strip(b" \t")
    return word.strip(b" \t").lower(), parameters


def _broken_multipart(reason: str) -> RequestError:
    return RequestError(
        "broken_multipart", f"the multipart body cannot be read ({reason}): {_HOW_TO_SEND}"
    )


def _plain_text(text: str) -> str:
    """BentoML's client writes form values as JSON, so a text comes in quotes."""
    if text.startswith('"') and text.endswith('"'):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text
