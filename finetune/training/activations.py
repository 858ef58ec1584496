"""Activations kept at the freeze boundary, on disk in bf16."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from models.engine.engine import Features
from models.errors import GraftError
from models.files import move_whole

logger = logging.getLogger("graft.inputs")

_DIGEST_SIZE = 32
# A label's index or, in multi-label data, a row of zeros and ones `float32 [C]`.
Target = int | npt.NDArray[np.float32]
Batch = tuple[torch.Tensor, Target]


class Activations(Dataset[Batch]):
    """Activations `bfloat16 [D]` on disk, with targets; each epoch reads the next view."""

    def __init__(self, views: Sequence[Bf16File], targets: Sequence[Target]) -> None:
        self._views = views
        self._targets = targets
        self.epoch = 1

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Batch:
        return self._views[(self.epoch - 1) % len(self._views)].read(index), self._targets[index]


class Bf16File:
    """A memory-mapped array `[N,D]` of bfloat16, which numpy lacks; assigned as float32."""

    def __init__(self, path: Path, num_rows: int, size: int, what: str = "") -> None:
        """The array that `keep` put at `path`, or a new one; `what` identifies its content."""
        self._path = path
        self._what = what
        self.is_kept = path.exists() and self._is_whole((num_rows, size))
        if self.is_kept:
            self._bits: npt.NDArray[np.uint16] = np.lib.format.open_memmap(path, mode="r")
            return
        try:
            self._bits = np.lib.format.open_memmap(
                self._unfinished, mode="w+", dtype=np.uint16, shape=(num_rows, size)
            )
            # On a full disk, writing to a mapped file without its blocks ends the process by
            # SIGBUS.
            with self._unfinished.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
        except OSError as error:
            self._unfinished.unlink(missing_ok=True)
            raise GraftError(
                f"{path}: the activations take {2 * num_rows * size / 1e6:,.1f} MB and cannot be "
                f"written: {error.strerror}; make room, name another --output, or say --no-cache, "
                "which keeps none"
            ) from error

    def _is_whole(self, shape: tuple[int, int]) -> bool:
        """Of the right shape and digest; a file that is not is computed again."""
        try:
            bits = np.lib.format.open_memmap(self._path, mode="r")
            with self._path.open("rb") as file:
                file.seek(-_DIGEST_SIZE, os.SEEK_END)
                if bits.shape != shape or file.read() != self._digest(bits):
                    raise ValueError("they are damaged, or of something else")
        except (OSError, ValueError) as error:
            logger.warning(
                "%s: the kept activations cannot be used (%s): they are computed again",
                self._path,
                error,
            )
            return False
        return True

    def _digest(self, bits: npt.NDArray[np.uint16]) -> bytes:
        digest = hashlib.sha256(self._what.encode())
        digest.update(bits.reshape(-1).data)
        return digest.digest()

    @property
    def _unfinished(self) -> Path:
        return self._path.with_suffix(".part")

    def keep(self) -> None:
        """All rows are written: append the digest, and move the file to its place."""
        self._bits.flush()  # type: ignore[attr-defined]
        with self._unfinished.open("ab") as file:
            file.write(self._digest(self._bits))
        move_whole(self._unfinished, self._path)
        self.is_kept = True

    def __setitem__(self, rows: Any, values: Features) -> None:
        rounded = torch.from_numpy(values).to(torch.bfloat16)
        self._bits[rows] = rounded.view(torch.uint16).numpy()

    def read(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self._bits[row].view(np.int16).copy()).view(torch.bfloat16)
