"""HTML pages from the Jinja2 templates (`*.html.j2`) that stand beside the code that fills them."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from models.images import Pixels

_ROOM = Path(__file__).parent


def render(template: str, **values: object) -> str:
    """The page of a template, given by its path within finetune/; every value is escaped.

    Raises jinja2.UndefinedError for a value that the template uses and that is missing.
    """
    return _environment().get_template(template).render(values)


def image_uri(crop: Pixels, encoding: Literal["JPEG", "WEBP"], quality: int) -> str:
    """`uint8 [H,W,3]` as a data URI, so that a page needs no other file."""
    encoded = io.BytesIO()
    Image.fromarray(crop).save(encoded, encoding, quality=quality)
    content = base64.b64encode(encoded.getvalue()).decode()
    return f"data:image/{encoding.lower()};base64,{content}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_ROOM),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_surrogates,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda fraction: f"{fraction:.1%}"
    return environment


def _without_surrogates(value: object) -> object:
    """File names may hold bytes that are not text; Python keeps them as lone surrogates."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.encode("utf-8", "replace").decode()
    return value
