"""Features kept on disk between runs, by image content: a second run computes only what is new.

One folder per backbone, precision and machine. Each run appends to a segment of its own, so that
simultaneous runs do not conflict: `.rows` has fixed-size records (features `float32 [F]` and their
CRC-32), `.keys` the digests of the images, written after the rows that they name. A run killed at
any moment leaves at worst rows without a key, which nobody reads.

Each segment costs its readers a file descriptor, so a run that finds too many merges the small ones
first. Their features are always in one place at least, and for a moment in two.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from models.engine.engine import EngineInfo, Features
from models.errors import GraftError
from models.files import move_whole
from models.preprocess import View

logger = logging.getLogger("graft.cache")

DIGEST_SIZE = 16
_CRC_SIZE = 4
# A folder with more segments is merged, except for large ones: copying those would cost more than
# their descriptors.
MAX_SEGMENTS = 32
_LARGE_BYTES = 32_000_000
# Merged at once; it also bounds the descriptors that hold their locks.
_MAX_MERGED = 256


def digest_image(data: bytes, view: View | None = None) -> bytes:
    """The key of a feature: a digest of the encoded bytes, and of the augmented view if any."""
    digest = hashlib.sha256(data)
    if view is not None:
        digest.update(repr(view).encode())
    return digest.digest()[:DIGEST_SIZE]


class FeatureCache:
    """The features of one backbone (`fingerprint`) on one engine.

    A context manager that closes its files. Raises GraftError if the folder cannot be written.
    """

    def __init__(
        self, cache_dir: Path, fingerprint: str, engine: EngineInfo, num_features: int
    ) -> None:
        # Another precision, batch, library or processor rounds differently.
        parts = [
            fingerprint,
            engine.engine,
            engine.device,
            engine.precision,
            engine.batch_size,
            num_features,
        ]
        self.folder = (
            cache_dir / "features" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        )
        self.num_hits = 0
        self.num_misses = 0
        self._is_full = False
        self._num_features = num_features
        self._record_size = 4 * num_features + _CRC_SIZE
        self._rows: dict[bytes, tuple[int, int]] = {}
        self._readers: list[int] = []
        self._writers: tuple[int, int] | None = None
        try:
            # Another run may trim the folder at any moment, even while it is made: what is gone is
            # computed again.
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(parents=True)
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder)  # recently used, for `trim`
                if sum(1 for _ in self.folder.glob("*.keys")) > MAX_SEGMENTS:
                    merge_segments(self.folder, self._record_size)
                self._index_all()
        except OSError as error:
            raise GraftError(
                f"--cache-dir {cache_dir}: {error.strerror}: {error.filename}; name another, or "
                "say --no-cache"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in (*self._readers, *(self._writers or ())):
            os.close(descriptor)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def read(self, digest: bytes, out: Features) -> bool:
        """Copy an image's features to `out` `[F]`; False if they are missing or damaged."""
        segment, row = self._rows.get(digest, (-1, 0))
        if segment >= 0:
            record = os.pread(self._readers[segment], self._record_size, row * self._record_size)
            if _is_whole(record, self._record_size):
                out[:] = np.frombuffer(record[:-_CRC_SIZE], np.float32)
                self.num_hits += 1
                return True
        return False

    def write(self, digests: Sequence[bytes], features: Features) -> None:
        """Append features `[B,F]`. A full disk ends caching with a warning; the run goes on."""
        self.num_misses += len(digests)
        if self._is_full:
            return
        rows = [np.ascontiguousarray(row, np.float32).tobytes() for row in features]
        records = b"".join(row + zlib.crc32(row).to_bytes(_CRC_SIZE, "little") for row in rows)
        try:
            rows_writer, keys_writer = self._open_writers()
            _write_all(rows_writer, records)
            _write_all(keys_writer, b"".join(digests))
        except OSError as error:
            self._is_full = True
            logger.warning(
                "the feature cache %s cannot take more (%s); this run goes on without it",
                self.folder,
                error.strerror,
            )

    def _open_writers(self) -> tuple[int, int]:
        while self._writers is None:
            stem = self.folder / uuid.uuid4().hex
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            rows, keys = (
                os.open(f"{stem}.rows", flags, 0o644),
                os.open(f"{stem}.keys", flags, 0o644),
            )
            # Locked while the process lives, as a run writes here. A merge may have been faster and
            # removed the file.
            with contextlib.suppress(OSError):
                fcntl.flock(keys, fcntl.LOCK_EX)
            if os.fstat(keys).st_nlink:
                self._writers = rows, keys
            else:
                os.close(rows)
                os.close(keys)
        return self._writers

    def _index_all(self) -> None:
        indexed: set[Path] = set()
        while new := sorted(set(self.folder.glob("*.keys")) - indexed):
            for keys_path in new:
                # Merged by another run meanwhile: the merged segment is found in the next round. A
                # folder in a file's place holds no features.
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                    self._index(keys_path)
            indexed.update(new)

    def _index(self, keys_path: Path) -> None:
        rows_path = keys_path.with_suffix(".rows")
        if rows_path.is_dir():
            return
        reader = os.open(rows_path, os.O_RDONLY)
        segment = len(self._readers)
        self._readers.append(reader)
        for row, digest in enumerate(_read_keys(keys_path, reader, self._record_size)):
            self._rows[digest] = segment, row


def merge_segments(folder: Path, record_size: int) -> None:
    """Write the small segments that no run writes to into one, then remove them.

    One process merges at a time, others go on without. Killed at any moment, it leaves every
    feature readable. Damaged ones are dropped.
    """
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(_locked(folder)):
            return
        for unfinished in folder.glob("*.unfinished"):
            # A merge that was killed: its keys could not be read yet.
            unfinished.with_suffix(".rows").unlink(missing_ok=True)
            unfinished.unlink()
        merged: list[Path] = []
        for keys_path in sorted(folder.glob("*.keys")):
            rows_path = keys_path.with_suffix(".rows")
            is_large = rows_path.exists() and rows_path.stat().st_size >= _LARGE_BYTES
            if (
                len(merged) < _MAX_MERGED
                and not is_large
                and stack.enter_context(_locked(keys_path))
            ):
                merged.append(keys_path)
        if len(merged) < 2:
            return
        stem = folder / uuid.uuid4().hex
        try:
            _write_merged(merged, stem, record_size)
        except OSError as error:
            for suffix in (".rows", ".unfinished"):
                stem.with_suffix(suffix).unlink(missing_ok=True)
            logger.warning(
                "the feature cache %s has many small files that cannot be merged: %s",
                folder,
                error.strerror,
            )
            return
        for keys_path in merged:
            # In this order: the next merge removes keys without rows, but never rows without keys.
            keys_path.with_suffix(".rows").unlink(missing_ok=True)
            keys_path.unlink()


def _write_merged(segments: Sequence[Path], stem: Path, record_size: int) -> None:
    unfinished = stem.with_suffix(".unfinished")
    seen: set[bytes] = set()
    with unfinished.open("wb") as keys, stem.with_suffix(".rows").open("wb") as rows:
        for keys_path in segments:
            with (
                contextlib.suppress(FileNotFoundError),
                keys_path.with_suffix(".rows").open("rb") as file,
            ):
                for digest in _read_keys(keys_path, file.fileno(), record_size):
                    record = file.read(record_size)
                    if digest not in seen and _is_whole(record, record_size):
                        seen.add(digest)
                        rows.write(record)
                        keys.write(digest)
    move_whole(unfinished, stem.with_suffix(".keys"))


def _read_keys(keys_path: Path, rows: int, record_size: int) -> list[bytes]:
    """The digests of the rows that exist."""
    keys = keys_path.read_bytes()
    num_rows = min(len(keys) // DIGEST_SIZE, os.fstat(rows).st_size // record_size)
    return [keys[row * DIGEST_SIZE : (row + 1) * DIGEST_SIZE] for row in range(num_rows)]


def _is_whole(record: bytes, record_size: int) -> bool:
    checksum = zlib.crc32(record[:-_CRC_SIZE]).to_bytes(_CRC_SIZE, "little")
    return len(record) == record_size and checksum == record[-_CRC_SIZE:]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the lock of a file or folder was free; it is held until the end, or the process's."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def trim(cache_dir: Path, max_bytes: int) -> None:
    """Remove the least recently used feature folders until the rest fits.

    A run that reads one of them keeps its open files.
    """
    found: list[tuple[float, int, Path]] = []
    for path in (cache_dir / "features").glob("*"):
        # Another run may trim at the same time: what it removed takes no room.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
            found.append((path.stat().st_mtime, num_bytes, path))
    total = sum(num_bytes for _, num_bytes, _ in found)
    for _, num_bytes, path in sorted(found):
        if total <= max_bytes:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= num_bytes


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
