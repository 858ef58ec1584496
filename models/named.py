"""A user's own function or class, named as `package.module:callable`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from models.errors import GraftError


def is_custom(name: str) -> bool:
    """Whether a backbone's name is `package.module:callable`; timm has names with a colon too."""
    return ":" in name and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def import_named(flag: str, name: str) -> Any:
    """Import the callable `name`, the value of the option `flag`; the current folder comes first.

    Raises GraftError where there is no such callable, or where importing its module fails.
    """
    module_name, _, attribute = name.partition(":")
    _search_current_folder_first()
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise GraftError(
            f"{flag} {name}: {error}; "
            "package.module:callable must be importable from the current folder"
        ) from error
    # The user's own code can raise anything.
    except (Exception, SystemExit) as error:
        raise GraftError(
            f"{flag} {name}: importing it raised {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise GraftError(
            f"{flag} {name}: it is of type {type(found).__name__}, and cannot be called"
        )
    return found


def _search_current_folder_first() -> None:
    # Python puts the folder of the program first (`finetune/`, when one is run as a file), and its
    # `data/` would hide a user's data.py. The folder stays on the path: a module may import its
    # neighbours later.
    folder = str(Path.cwd())
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
