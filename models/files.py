"""Files and folders written whole or not at all, even when the process or the machine stops.

What is written goes to a temporary sibling, `.tmp-…`, is flushed to the disk and then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_PREFIX = ".tmp-"


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file: text in UTF-8, bytes, or what a function writes to the path that it is given.

    Raises OSError, and whatever the function raises; the file that was there before then stays.
    """
    temporary = path.with_name(_temporary_name())
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        move_whole(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which is made too; removed at the end unless `move_whole` moved it.

    Raises OSError.
    """
    temporary = parent / _temporary_name()
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_whole(written: Path, path: Path) -> bool:
    """Flush a file or a folder of files to the disk and rename it to `path`, in the same folder.

    A file replaces the one at `path`. A folder does not: False where one with files stands there.
    Raises OSError.
    """
    if written.is_dir():
        for file in written.iterdir():
            _fsync(file)
    _fsync(written)
    try:
        written.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    _fsync(path.parent)
    return True


def remove_temporary(folder: Path, older_than_seconds: float = 0) -> None:
    """Remove the temporary files and folders in `folder`, which killed processes left.

    With an age, those that another process may be writing stay.
    """
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < older_than_seconds:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _temporary_name() -> str:
    return f"{_PREFIX}{uuid.uuid4().hex}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
