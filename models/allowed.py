"""What an option allows, as text made from its type and limits: help and errors cannot differ."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo


def describe_allowed(field: FieldInfo) -> str:
    """What a pydantic field allows besides None: `a whole number from 1 up`, `true or false`."""
    kind = _without_none(field.annotation)
    if get_origin(kind) is Literal:
        *others, last = (str(choice) for choice in get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if kind is bool:
        return "true or false"
    if kind is int:
        return f"a whole number{_describe_range(field.metadata, True)}"
    if kind is float:
        return f"a number{_describe_range(field.metadata, False)}"
    return "a path" if kind is Path else "text"


def _without_none(annotation: Any) -> Any:
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if get_origin(annotation) is not Literal and len(kinds) == 1 else annotation


def _describe_range(limits: list[Any], is_whole: bool) -> str:
    """` from 1 up`, ` above 0 and below 1`; whole numbers `from 1` rather than `above 0`."""
    parts = []
    for limit in limits:
        match limit:
            case Ge(ge=bound):
                parts.append(f"from {bound}")
            case Gt(gt=int(bound)) if is_whole:
                parts.append(f"from {bound + 1}")
            case Gt(gt=bound):
                parts.append(f"above {bound}")
            case Le(le=bound):
                parts.append(f"to {bound}")
            case Lt(lt=int(bound)) if is_whole:
                parts.append(f"to {bound - 1}")
            case Lt(lt=bound):
                parts.append(f"{'and ' if parts else ''}below {bound}")
    is_open = bool(parts) and parts[-1].startswith("from")
    return "".join(f" {part}" for part in parts) + (" up" if is_open else "")
