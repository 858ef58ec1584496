"""What a user names as `package.module:callable`, imported."""

from __future__ import annotations

import importlib
from typing import Any

from models.errors import GraftError


def import_named(flag: str, name: str) -> Any:
    """The callable; raises GraftError, with the `flag` that named it, where there is none or where importing its module fails."""
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise GraftError(
            f"{flag} {name}: {error}; package.module:callable must be importable from the current folder"
        ) from error
    # The user's own code: whatever it raises is theirs to read.
    except (Exception, SystemExit) as error:
        raise GraftError(
            f"{flag} {name}: importing it raised {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise GraftError(
            f"{flag} {name}: it is of type {type(found).__name__}, and cannot be called"
        )
    return found
