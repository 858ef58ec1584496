"""What the protocols of other servers share.

They have strict JSON, images in base64, one model per route, and no error per image.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import NoReturn, TypeVar
from urllib.parse import unquote

import numpy as np
from pydantic import BaseModel, ValidationError

from models.checkpoint import ALL_MODELS
from models.images import ImageError
from service.errors import RequestError, image_error_code
from service.inference.predictor import Answer
from service.inference.repository import Model
from service.inference.server import Server
from service.tasks.task import Scores
from service.web.uploads import too_many_images

Shape = TypeVar("Shape", bound=BaseModel)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def choose_one(server: Server, name: str, version: str = "") -> Model:
    """The model that a route's path names; raises RequestError where there is none.

    `all`, which /predict takes, names no model here.
    """
    if name == ALL_MODELS:
        server.check_ready()
        raise RequestError(
            "no_such_model",
            f"no model {ALL_MODELS!r} has this route; POST /predict?model=all asks every model",
        )
    (model,) = server.choose(name, version)
    return model


def check_num_images(num_images: int, server: Server) -> None:
    """Raises RequestError where there is no image, or more than a request may have."""
    if num_images < 1:
        raise RequestError("no_image", "the request has no image; send at least one")
    if num_images > server.settings.max_images:
        raise too_many_images(server.settings.max_images)


def parse_json(
    data: bytes, shape: type[Shape], *, example: str, max_keys: int, max_values: int
) -> Shape:
    """Strict JSON as `shape`; raises RequestError with the place that is wrong, and `example`.

    Keys and values are counted before the JSON is parsed, which blocks the event loop: a million
    keys take 1 s, a million numbers 0.1 s, and ten bytes of JSON can become a hundred of Python.
    """
    if data.count(b":") > max_keys or sum(map(data.count, (b",", b"[", b"{"))) > max_values:
        raise RequestError(
            "body_too_large",
            f"the JSON has more than {max_keys} keys or {max_values} values; send fewer images, or "
            "binary data instead",
        )
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    # RecursionError: nested deeper than any tensor.
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "bad_request", f"the body is not JSON ({str(error)[:100]}); send {example}"
        ) from None
    try:
        return shape.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:50] for part in first["loc"][:6]) or "the body"
        raise RequestError(
            "bad_request", f"{place}: {first['msg'].removeprefix('Value error, ')}; send {example}"
        ) from None


def decode_base64(text: str, place: str) -> bytes:
    """The bytes of base64 in any form: wrapped lines, URL-safe (RFC 4648, 5), unpadded, data: URL.

    Raises RequestError that names `place`.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.replace(" ", "").lower().endswith(";base64"):
            raise RequestError(
                "bad_request",
                f"{place} is a data: URL that does not say ';base64,' before its data "
                f"({head[:50]!r}); encode the image file in base64",
            )
        text = unquote(text)
    try:
        digits = text.encode("ascii").translate(_URL_SAFE, b" \t\r\n")
        if not digits.endswith(b"="):
            digits += b"=" * (-len(digits) % 4)
        return base64.b64decode(digits, validate=True)
    except ValueError as error:
        raise RequestError(
            "bad_request",
            f"{place} is not base64 ({str(error)[:100]}); encode the image file itself: URLs are "
            "not fetched",
        ) from None


def read_scores(answer: Answer, place: Callable[[int], str]) -> Scores:
    """Probabilities `[N,C]`; raises RequestError for the first unreadable image.

    `place` names an image by its index.
    """
    rows = []
    for index, result in enumerate(answer.results):
        if isinstance(result, ImageError):
            raise RequestError(image_error_code(result), f"{place(index)}: {result}")
        rows.append(result)
    return np.stack(rows)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
