"""Files that are there whole or not at all, whenever the process or the machine ends."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

_TEMPORARY = ".tmp-"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a temporary sibling, and put it in the place of `path` at once. Raises what `write` raises, and OSError."""
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """What a killed process left behind; only while no other one writes there."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have what was written to a file, or to a folder's list of files, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
