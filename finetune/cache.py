"""Features kept on disk between runs, by image content: a second run over the same or a grown folder computes only what is new.

One folder a backbone, precision and machine. Each run appends to a segment of its own, so that two runs at once cannot meet: `.rows` has
fixed-size records (features `float32 [F]` and their CRC-32), `.keys` the digests of the images, written after the rows that they name. A
run killed at any moment leaves at worst rows without a key, which nobody reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from models.engine import EngineInfo, Features
from models.errors import GraftError
from models.preprocess import View

logger = logging.getLogger("graft.cache")

DIGEST_SIZE = 16
_CRC_SIZE = 4


def digest_image(data: bytes, view: View | None = None) -> bytes:
    """What a feature is looked up by: the encoded bytes, and the augmented view of them if it is one."""
    digest = hashlib.sha256(data)
    if view is not None:
        digest.update(repr(view).encode())
    return digest.digest()[:DIGEST_SIZE]


class FeatureCache:
    """The features of one backbone (`fingerprint`) on one engine; a context manager that closes its files.

    Raises GraftError where the folder cannot be written.
    """

    def __init__(self, cache_dir: Path, fingerprint: str, engine: EngineInfo, num_features: int) -> None:
        # Another precision, batch, library or processor rounds differently.
        parts = [fingerprint, engine.engine, engine.device, engine.precision, engine.batch_size, num_features]
        self.folder = cache_dir / "features" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        self.num_hits = 0
        self.num_misses = 0
        self._is_full = False
        self._num_features = num_features
        self._record_size = 4 * num_features + _CRC_SIZE
        self._rows: dict[bytes, tuple[int, int]] = {}
        self._readers: list[int] = []
        self._writers: tuple[int, int] | None = None
        try:
            # Another run may trim the folder at any moment, even while it is made: what it takes away is computed anew.
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(parents=True)
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder)  # what `trim` calls recently used
                for keys_path in sorted(self.folder.glob("*.keys")):
                    self._index(keys_path)
        except OSError as error:
            raise GraftError(f"--cache-dir {cache_dir}: {error.strerror}: {error.filename}; name another, or say --no-cache") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in (*self._readers, *(self._writers or ())):
            os.close(descriptor)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def read(self, digest: bytes, out: Features) -> bool:
        """Copy an image's features to `out` `[F]`; False where they are not there, or no longer what was written."""
        segment, row = self._rows.get(digest, (-1, 0))
        if segment >= 0:
            record = os.pread(self._readers[segment], self._record_size, row * self._record_size)
            values, checksum = record[:-_CRC_SIZE], record[-_CRC_SIZE:]
            if len(record) == self._record_size and zlib.crc32(values).to_bytes(_CRC_SIZE, "little") == checksum:
                out[:] = np.frombuffer(values, np.float32)
                self.num_hits += 1
                return True
        return False

    def write(self, digests: Sequence[bytes], features: Features) -> None:
        """Append features `[B,F]`. A full disk ends the caching of this run, with a warning, and not the run."""
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
            logger.warning("the feature cache %s cannot take more (%s); this run goes on without it", self.folder, error.strerror)

    def _open_writers(self) -> tuple[int, int]:
        if self._writers is None:
            stem = self.folder / uuid.uuid4().hex
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._writers = (os.open(f"{stem}.rows", flags, 0o644), os.open(f"{stem}.keys", flags, 0o644))
        return self._writers

    def _index(self, keys_path: Path) -> None:
        rows_path = keys_path.with_suffix(".rows")
        keys = keys_path.read_bytes()
        num_rows = min(len(keys) // DIGEST_SIZE, rows_path.stat().st_size // self._record_size)
        segment = len(self._readers)
        self._readers.append(os.open(rows_path, os.O_RDONLY))
        self._rows.update((keys[row * DIGEST_SIZE : (row + 1) * DIGEST_SIZE], (segment, row)) for row in range(num_rows))


def trim(cache_dir: Path, max_bytes: int) -> None:
    """Remove the feature folders used longest ago until the rest fits; a run that reads one meanwhile keeps its open files."""
    found: list[tuple[float, int, Path]] = []
    for path in (cache_dir / "features").glob("*"):
        # Another run may trim at the same time: what it removed first takes no room.
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
