"""Files and folders written whole or not at all, even when the process or the machine stops.

What is written goes to a temporary sibling, `.tmp-…`, is flushed to the disk and then renamed. File
systems without permissions (exFAT, CIFS) or without fsync of a folder (CIFS, FUSE, 9p) are written
to as well as they allow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from models.errors import GraftError, describe_error

_PREFIX = ".tmp-"
# A disk with less room than this is full, for a library that could not write to it.
_FULL_BYTES = 1_000_000
# What a file system answers to an operation that it does not have.
_NOT_SUPPORTED = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EBADF,
    errno.EPERM,
    errno.EACCES,
    errno.EISDIR,
}


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
def scratch_folder() -> Iterator[Path]:
    """A new folder in TMPDIR, removed at the end. Raises GraftError where none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="graft-", ignore_cleanup_errors=True)
    except OSError as error:
        raise GraftError(
            f"TMPDIR={os.environ.get('TMPDIR', '')}: no folder for temporary files can be written "
            f"to ({describe_error(error)}); set TMPDIR to one that can"
        ) from error
    with folder:
        yield Path(folder.name)


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


def find_home() -> Path:
    """The user's home; for a user without one, as containers have them, a folder in TMPDIR."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.environ.get("TMPDIR") or "/tmp") / f"graft-{os.getuid()}"


def check_writable(folder: Path, num_bytes: int = 0) -> None:
    """Write, flush and rename a file in `folder`, or in the one that it would be made in.

    What is done at the end of long work fails here before it. Raises OSError, also where there is
    no room for `num_bytes`.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with temporary_folder(existing) as temporary:
            write_whole(temporary / "written", bytes(4096))
    except OSError as error:
        # Its user chose the folder, not the names in it.
        error.filename, error.filename2 = str(existing), None
        raise
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        wanted = f"{free / 1e6:.0f} MB free, {num_bytes / 1e6:.0f} MB needed"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({wanted})", str(existing))


def make_readable(path: Path) -> None:
    """Let every user read a file, where the file system has permissions."""
    try:
        path.chmod(0o644)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def describe_write_error(error: Exception, folder: Path) -> str:
    """`describe_error`, or that the disk of `folder` is full, which libraries do not say."""
    if not isinstance(error, OSError) and _is_full(folder):
        return f"{os.strerror(errno.ENOSPC)}: {folder}"
    return describe_error(error)


@contextlib.contextmanager
def full_disk_in_words(folders: Mapping[str, Path]) -> Iterator[None]:
    """Raise GraftError for a write within that had no room, with the folders that are full.

    `folders` are those that are written to, by the name under which the user can set them.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        full = [f"{name} {folder}" for name, folder in folders.items() if _is_full(folder)]
        raise GraftError(
            f"{', '.join(full) or 'a disk'}: {describe_error(error)}; make room, or name another "
            "folder"
        ) from error


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free < _FULL_BYTES
    return False


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
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
