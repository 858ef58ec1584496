"""A request's body → images and options, with every limit checked while it is read.

Text is never taken for a URL to fetch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.message import Message

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.errors import RequestError
from service.inference.memory_budget import Reservation
from service.settings import Settings
from service.web.content_encoding import decode_content
from service.web.numbers import parse_whole_number

IMAGES_FIELD = "images"
OPTION_FIELDS = ("model", "version", "top_k")
_MAX_OPTION_BYTES = 1024
_MAX_BOUNDARY_BYTES = 256
_HOW_TO_SEND = (
    "send multipart/form-data with one or more files in the field 'images' "
    "(curl -F images=@photo.jpg), or one image as the body "
    "(curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg')"
)
_HOW_TO_SEND_JSON = (
    'send images in base64 to POST /v1/models/NAME:predict, as {"instances": [{"b64": "…"}]}'
)
# It logs every broken form, which the client is told of and the access log has anyway.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class NamedImage:
    """An encoded image, and its name in error messages."""

    name: str
    data: bytes


@dataclass
class Upload:
    """The images of a request in order, and its options as text."""

    images: list[NamedImage] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


async def read_upload(request: Request, settings: Settings, reservation: Reservation) -> Upload:
    """Read a multipart or a raw image body.

    Raises RequestError with the way out, and ClientDisconnect where the client left.
    """
    content_type, parameters = parse_options_header(request.headers.get("content-type"))
    chunks = _read_chunks(request, settings.max_body_bytes, reservation)
    try:
        async with asyncio.timeout(settings.body_seconds):
            if content_type == b"multipart/form-data":
                boundary = parameters.get(b"boundary", b"")
                upload = await read_form(chunks, boundary, settings.max_images)
            elif content_type.startswith(b"image/") or content_type == b"application/octet-stream":
                data = await _join(chunks)
                upload = Upload([NamedImage("the image", data)] if data else [])
            elif not content_type and _may_be_image(data := await _join(chunks)):
                upload = Upload([NamedImage("the image", data)])
            else:
                raise _unsupported_content_type(content_type.decode("latin-1"))
    except TimeoutError:
        raise _body_timeout(settings.body_seconds) from None
    for name in OPTION_FIELDS:
        _add_from_query(upload.options, name, request.query_params.get(name, ""))
    if not upload.images:
        raise RequestError("no_image", f"the request has no image: {_HOW_TO_SEND}")
    return upload


def _add_from_query(options: dict[str, str], name: str, asked: str) -> None:
    """Raises RequestError where form and query ask for different values."""
    in_form = options.get(name, "")
    if asked and in_form and asked != in_form:
        raise RequestError(
            "bad_parameter",
            f"{name!r} is {asked[:100]!r} in the query and {in_form[:100]!r} in the form; send it "
            "once",
        )
    if asked:
        options[name] = asked


def _may_be_image(data: bytes) -> bool:
    """Whether a body is something else than text; of images, only PNM can begin like one."""
    start = data[:64]
    is_text = all(byte >= 32 or byte in b"\t\r\n" for byte in start)
    return not is_text or re.match(rb"P[1-7]\s", start) is not None


async def read_body(request: Request, settings: Settings, reservation: Reservation) -> bytes:
    """The whole body, for protocols that have their images in JSON.

    Raises RequestError where it is too large or does not arrive, and ClientDisconnect.
    """
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _join(_read_chunks(request, settings.max_body_bytes, reservation))
    except TimeoutError:
        raise _body_timeout(settings.body_seconds) from None


async def read_form(chunks: AsyncIterator[bytes], boundary: bytes, max_images: int) -> Upload:
    """Read a multipart body (RFC 7578). Raises RequestError at the first part that is wrong.

    python-multipart finds the parts. Against a parser of our own for whole bodies, this costs
    0.04 ms for a photo of 60 KB, 0.5 % of a request (docs/serve-benchmark.md).
    """
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        if not boundary:
            raise _broken_multipart(
                "the Content-Type header has no boundary: do not set this header, the client "
                "library does, with the boundary that it puts between the parts"
            )
        raise _broken_multipart(
            f"the Content-Type header has a boundary of {len(boundary)} bytes, "
            f"1 to {_MAX_BOUNDARY_BYTES} are allowed"
        )
    form = _Form(max_images)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": form.begin_part,
            "on_header_field": form.add_header_name,
            "on_header_value": form.add_header_value,
            "on_header_end": form.end_header,
            "on_part_data": form.add_data,
            "on_part_end": form.end_part,
            "on_end": form.end,
        },
    )
    try:
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError as error:
        raise _broken_multipart(str(error)) from None
    if not form.is_complete:
        raise _broken_multipart("it ends before its last boundary")
    return form.upload


def too_many_images(max_images: int) -> RequestError:
    return RequestError(
        "too_many_images",
        f"the request has more than {max_images} images (GRAFT_MAX_IMAGES); "
        "send them in several requests",
    )


class _Form:
    """Puts the parts of a form together from the pieces that python-multipart finds."""

    def __init__(self, max_images: int) -> None:
        self.upload = Upload()
        self.is_complete = False
        self._max_images = max_images
        self._num_parts_left = max_images + len(OPTION_FIELDS) + 1
        self._num_option_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._data: list[bytes] = []

    def begin_part(self) -> None:
        self._headers = {}
        self._data = []

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def end_part(self) -> None:
        self._num_parts_left -= 1
        if self._num_parts_left < 0:
            raise too_many_images(self._max_images)
        disposition = self._headers.get(b"content-disposition", b"")
        _, parameters = parse_options_header(disposition)
        name = _read_parameter(disposition, parameters, "name") or ""
        data = b"".join(self._data)
        if name == IMAGES_FIELD:
            self._add_image(self._file_name(disposition, parameters), data)
        elif name in OPTION_FIELDS:
            self._add_option(name, data)
        else:
            raise RequestError(
                "unknown_field",
                f"the form has a field {name[:100]!r}; its fields are 'images' (files), 'model', "
                "'version' and 'top_k'",
            )

    def end(self) -> None:
        self.is_complete = True

    def _file_name(self, disposition: bytes, parameters: dict[bytes, bytes]) -> str | None:
        """The name of the part's file, "" for a file without one, None for text."""
        name = _read_parameter(disposition, parameters, "filename")
        if name is not None:
            return name
        # Some clients give a part its type and no file name.
        content_type = self._headers.get(b"content-type", b"")
        return "" if content_type.startswith((b"image/", b"application/octet-stream")) else None

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


def _read_parameter(disposition: bytes, parameters: dict[bytes, bytes], name: str) -> str | None:
    """A parameter of Content-Disposition, from `name=` or else from `name*=` (RFC 8187).

    RFC 7578 forbids the second in forms, which is why python-multipart leaves it out of
    `parameters`, but urllib3 below 1.25 sends a non-ASCII file name in no other way.
    """
    plain = parameters.get(name.encode())
    if plain is not None:
        return plain.decode("utf-8", "replace")
    if b"*" not in disposition:
        return None
    message = Message()
    message["Content-Disposition"] = disposition.decode("latin-1")
    try:
        value = message.get_param(name, header="Content-Disposition")
    # Its pieces are numbered wrongly (`name*=…; name*0=…`): a file is read without its name.
    except (TypeError, ValueError):
        return ""
    if not isinstance(value, tuple):
        return value
    charset, _, text = value
    # RFC 8187 has UTF-8 alone, and older clients ISO-8859-1. Python's codecs are not for names that
    # strangers choose: some fail, and some give lone surrogates.
    encoding = "latin-1" if (charset or "").lower() == "iso-8859-1" else "utf-8"
    return text.encode("latin-1", "replace").decode(encoding, "replace")


async def _read_chunks(
    request: Request, max_bytes: int, reservation: Reservation
) -> AsyncIterator[bytes]:
    """The body chunk by chunk, decompressed.

    A body that is too large is refused by its Content-Length before a byte is read, and by its true
    size where there is none, or where it is compressed.
    """
    _check_transfer_coding(", ".join(request.headers.getlist("transfer-encoding")))
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and parse_whole_number(announced, max_bytes) is None:
        raise _body_too_large(max_bytes)
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    received = 0
    async for chunk in decode_content(request.stream(), encoding):
        received += len(chunk)
        if received > max_bytes:
            raise _body_too_large(max_bytes, "the decompressed body" if encoding else "the body")
        reservation.add(len(chunk))
        yield chunk


def _check_transfer_coding(codings: str) -> None:
    """Raises RequestError for a coding below `chunked`, which uvicorn leaves in the body."""
    if codings and codings.strip().lower() != "chunked":
        raise RequestError(
            "unsupported_transfer_encoding",
            f"Transfer-Encoding: {codings[:100]} is not undone here, only chunked is; to send a "
            "compressed body, say Content-Encoding: gzip or deflate instead",
        )


async def _join(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def _body_timeout(seconds: float) -> RequestError:
    return RequestError("body_timeout", f"the body did not arrive within {seconds:g} s")


def _body_too_large(max_bytes: int, what: str = "the body") -> RequestError:
    return RequestError(
        "body_too_large",
        f"{what} is larger than {max_bytes} bytes (GRAFT_MAX_BODY_BYTES); "
        "send fewer or smaller images",
    )


def _unsupported_content_type(content_type: str) -> RequestError:
    is_json = content_type.endswith(("/json", "+json"))
    way_out = f"{_HOW_TO_SEND_JSON}; or {_HOW_TO_SEND}" if is_json else _HOW_TO_SEND
    shown = content_type[:100] or "missing, and the body is no image"
    return RequestError("unsupported_content_type", f"the content type is {shown}: {way_out}")


def _broken_multipart(reason: str) -> RequestError:
    return RequestError(
        "broken_multipart", f"the multipart body cannot be read ({reason}): {_HOW_TO_SEND}"
    )


def _plain_text(text: str) -> str:
    """`text` without the quotes of JSON, in which BentoML's client writes a form's values."""
    if text.startswith('"') and text.endswith('"'):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text
