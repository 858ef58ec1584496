"""What an option allows, in words: read from its type and its limits, so that help, check and error cannot differ."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo


def describe_allowed(field: FieldInfo) -> str:
    """`a whole number from 1 up`, `auto, cpu or cuda`, `true or false` …: what `field` of a pydantic model takes, besides nothing."""
    kind = _without_none(field.annotation)
    if get_origin(kind) is Literal:
        *others, last = (str(choice) for choice in get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if kind is bool:
        return "true or false"
    if kind is int:
        return f"a whole number{_range(field.metadata, True)}"
    if kind is float:
        return f"a number{_range(field.metadata, False)}"
    return "a path" if kind is Path else "text"


def _without_none(annotation: Any) -> Any:
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if get_origin(annotation) is not Literal and len(kinds) == 1 else annotation


def _range(limits: list[Any], is_whole: bool) -> str:
    """` from 1 up`, ` above 0 and below 1`; a limit that whole numbers do not reach is named by the last one that they do."""
    words = []
    for limit in limits:
        match limit:
            case Ge(ge=bound):
                words.append(f"from {bound}")
            case Gt(gt=int(bound)) if is_whole:
                words.append(f"from {bound + 1}")
            case Gt(gt=bound):
                words.append(f"above {bound}")
            case Le(le=bound):
                words.append(f"to {bound}")
            case Lt(lt=int(bound)) if is_whole:
                words.append(f"to {bound - 1}")
            case Lt(lt=bound):
                words.append(f"{'and ' if words else ''}below {bound}")
    return "".join(f" {word}" for word in words) + (
        " up" if words and words[-1].startswith("from") else ""
    )
