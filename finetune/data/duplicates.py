"""Images that are the same: to the byte, or the same picture encoded or resized.

Features cannot tell copies from similar images. On 28x28 photographs of clothes a copy at six
tenths of the size has a cosine of 0.15 to 0.6 to its original, in centred features of
EfficientNet-Lite0, and other trousers have up to 0.93; of 256x256 emoji one in twelve has another
above 0.95. Small pixels can: a copy's noise is spread over the picture, and what distinguishes two
pictures is in one place, so the cell of a grid that differs most decides. All pairs are compared,
block by block, so that memory grows with the number of images and not with its square.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from finetune.data.cache import FeatureCache, digest_image
from finetune.data.splits import Sample, Splits
from finetune.terminal import progress_bar
from models.engine.engine import EngineInfo
from models.images import ImageError
from models.preprocess import Preprocess
from models.scores import Floats

_WHOLE_IMAGE = Preprocess(
    height=32, width=32, crop_fraction=1.0, crop_mode="squash", interpolation="bilinear"
)
_COARSE_SIDE = 8
_NUM_CELLS = 3 * _COARSE_SIDE**2
# How far two copies may differ in any cell, of 255. Measured on the 32x32 grid: 400 copies of emoji
# (JPEG of quality 30 to 85, WebP, half to twice the size) up to 15, other emoji from 25. An image
# needs three pixels a cell; smaller ones are compared on the 8x8 grid, where copies of 28x28
# clothes (down to 17x17) differ by up to 11, other clothes from 12.
_MIN_SIDE = 96
_LIMIT, _COARSE_LIMIT = 22.0, 12.0
# And never by more than this fraction of their contrast (standard deviation): two foggy landscapes
# are alike in all cells.
_MAX_FRACTION_OF_CONTRAST = 0.6
# Only pairs whose 8x8 grids differ by less than this, root mean square, are compared on signatures.
# Copies differ by up to 4.
_MAX_COARSE_DIFFERENCE = 6.0
_BLOCK_BYTES = 16_000_000
# Of one image: a thousand blank ones have half a million pairs, and a few each connect them.
_MAX_PAIRS = 8
_Grid = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Signature:
    """What two images are compared by.

    A digest of the bytes, the shorter side in pixels, the whole image on two grids `[side,side,3]`.
    """

    digest: bytes
    shorter_side: int
    fine: _Grid
    coarse: _Grid

    def is_copy_of(self, other: Signature) -> bool:
        """Whether one is the other, encoded or resized."""
        if self.digest == other.digest:
            return True
        is_fine = min(self.shorter_side, other.shorter_side) >= _MIN_SIDE
        first, second = (self.fine, other.fine) if is_fine else (self.coarse, other.coarse)
        contrast = min(float(first.std()), float(second.std()))
        limit = min(_LIMIT if is_fine else _COARSE_LIMIT, _MAX_FRACTION_OF_CONTRAST * contrast)
        return int(np.abs(first - second).max()) <= limit

    def similarity(self, other: Signature) -> float:
        """1 where all cells are the same, 0 between black and white."""
        return 1 - float(np.abs(self.fine - other.fine).mean()) / 255


@dataclass(frozen=True)
class Duplicates:
    """Groups of samples that are the same image, in the order of the splits.

    `signatures` are of those in groups, by `id` of the sample. `digests` of the bytes of every
    image that could be read, by the sample's key, show later whether it has changed.
    """

    groups: tuple[tuple[Sample, ...], ...]
    signatures: dict[int, Signature]
    digests: dict[str, bytes] = field(default_factory=dict)

    def is_exact(self, first: Sample, second: Sample) -> bool:
        """Whether two of a group are the same to the byte."""
        return self.signatures[id(first)].digest == self.signatures[id(second)].digest

    def similarity(self, first: Sample, second: Sample) -> float:
        """Of two of a group, 1 where they are exact copies."""
        return self.signatures[id(first)].similarity(self.signatures[id(second)])


def open_grids(cache_dir: Path) -> FeatureCache:
    """Coarse grids of images seen before, so that a second run decodes nothing to find copies."""
    how = EngineInfo(f"pillow {importlib.metadata.version('pillow')}", "cpu", "uint8", 1, 1, 0.0)
    return FeatureCache(cache_dir, "coarse grid, 1", how, _NUM_CELLS)


def find_duplicates(
    splits: Splits, *, num_workers: int, cache: FeatureCache | None = None
) -> Duplicates:
    """Groups of copies within and across splits; unreadable images are in none.

    `cache` holds coarse grids.
    """
    samples = [sample for _, of_split in splits.named() for sample in of_split]
    grids = np.zeros((len(samples), _NUM_CELLS), np.uint8)
    is_read = np.zeros(len(samples), bool)
    digests: dict[str, bytes] = {}
    read = functools.partial(_read_coarse, cache=cache)
    for index, coarse in enumerate(_map(read, samples, num_workers, "looking for copies")):
        if coarse is not None:
            grids[index], is_read[index] = coarse.grid, True
            digests[samples[index].key] = coarse.digest
            if cache is not None and coarse.is_new:
                cache.write([coarse.digest], coarse.grid[None])
    places = np.flatnonzero(is_read)
    pairs = [
        (int(places[first]), int(places[second])) for first, second in _near_pairs(grids[places])
    ]
    candidates = sorted({index for pair in pairs for index in pair})
    candidate_samples = [samples[index] for index in candidates]
    found = _map(_read_signature, candidate_samples, num_workers, "comparing copies")
    signatures = dict(zip(candidates, found, strict=True))

    def is_copy(pair: tuple[int, int]) -> bool:
        first, second = signatures[pair[0]], signatures[pair[1]]
        return first is not None and second is not None and first.is_copy_of(second)

    groups = _connect(pair for pair in pairs if is_copy(pair))
    in_groups = {
        id(samples[index]): signature
        for group in groups
        for index in group
        if (signature := signatures[index]) is not None
    }
    return Duplicates(
        tuple(tuple(samples[index] for index in group) for group in groups), in_groups, digests
    )


@dataclass(frozen=True)
class _CoarseSignature:
    """The digest of an image and its coarse grid `float32 [192]`; new if not from the cache."""

    digest: bytes
    grid: Floats
    is_new: bool


def _read_coarse(sample: Sample, cache: FeatureCache | None) -> _CoarseSignature | None:
    """None if the image cannot be read."""
    try:
        data = sample.read()
    except (OSError, ValueError):
        return None
    digest, grid = digest_image(data), np.empty(_NUM_CELLS, np.float32)
    if cache is not None and cache.read(digest, grid):
        return _CoarseSignature(digest, grid, False)
    signature = _compute_signature(data)
    if signature is None:
        return None
    return _CoarseSignature(digest, signature.coarse.reshape(-1).astype(np.float32), True)


def _read_signature(sample: Sample) -> Signature | None:
    """None if the image cannot be read."""
    try:
        return _compute_signature(sample.read())
    except (OSError, ValueError):
        return None


def _compute_signature(data: bytes) -> Signature | None:
    try:
        opened = _WHOLE_IMAGE.open(data)
        fine = _WHOLE_IMAGE.crop(opened)
    except ImageError:
        return None
    # From the fine grid: resized in one step, it would depend on the size resized from.
    coarse = np.asarray(
        Image.fromarray(fine).resize((_COARSE_SIDE, _COARSE_SIDE), Image.Resampling.BILINEAR)
    )
    shorter_side = min(opened.width, opened.height)
    return Signature(
        digest_image(data), shorter_side, fine.astype(np.int16), coarse.astype(np.int16)
    )


_Result = TypeVar("_Result")


def _map(
    work: Callable[[Sample], _Result], samples: Sequence[Sample], num_workers: int, description: str
) -> Iterator[_Result]:
    """In threads, in order, a few hundred at a time."""
    with (
        ThreadPoolExecutor(num_workers, thread_name_prefix="duplicates") as pool,
        progress_bar(description, len(samples)) as advance,
    ):
        for start in range(0, len(samples), 256):
            chunk = samples[start : start + 256]
            yield from pool.map(work, chunk)
            advance(len(chunk))


def _near_pairs(coarse: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Pairs (lower place first) of grids `[N,192]` that differ little, each image's nearest."""
    start, limit = 0, _MAX_COARSE_DIFFERENCE**2 * coarse.shape[1]
    while start < len(coarse):
        size = max(1, min(len(coarse) - start, _BLOCK_BYTES // (4 * (len(coarse) - start))))
        # Around zero, float32 is exact enough for |a - b|² = |a|² + |b|² - 2ab.
        rest = coarse[start:].astype(np.float32) - 128
        squares = np.square(rest).sum(axis=1)
        distances = squares[:size, None] + squares[None, :] - 2 * (rest[:size] @ rest.T)
        # Each pair once, and none with itself.
        distances[:, :size][np.tril_indices(size)] = np.inf
        rows, columns = np.nonzero(distances <= limit)
        for row, first in zip(*np.unique(rows, return_index=True), strict=True):
            found = columns[first : np.searchsorted(rows, row, "right")]
            nearest = found[np.argsort(distances[row, found], kind="stable")[:_MAX_PAIRS]]
            yield from ((start + int(row), start + int(column)) for column in nearest)
        start += size


def _connect(pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Connected components of two or more."""
    parents: dict[int, int] = {}

    def root(index: int) -> int:
        while parents.setdefault(index, index) != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parents[high] = low
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in sorted(parents):
        groups[root(index)].append(index)
    return tuple(tuple(group) for group in groups.values())
