"""Images that are the same: to the byte, or the same picture encoded or resized.

Features cannot separate copies from similar images. On 28x28 photographs of clothes, in centred
features of EfficientNet-Lite0, a copy resized to 0.6 times the size has a cosine of 0.15 to 0.6 to
its original, while two different images of the same class (trousers) reach 0.93; of 256x256 emoji
one in twelve has a different one above 0.95. Downscaled pixels can: the noise of a copy lies along
edges, and what distinguishes two pictures is in places where one of them has none. So the cell of a
grid that differs most, compared with how much the cells around it differ, decides.

Only images whose luma is alike on a coarser grid are compared, found through a tree, in memory that
grows with the number of images and not with its square. Measured in docs/audit.md.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
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
_GRID_SIDE = 16
_NUM_BYTES = 3 * _GRID_SIDE**2
_NUM_FLOATS = _NUM_BYTES // 4 + 2
# How far two copies may differ in any cell, of 255 in luma. What encoding and resizing change grows
# as a cell has fewer pixels (the power fits icons of 22 to 64 pixels), until the image has fewer
# than the grid has cells: a digit of 10x10 has no noise that could not be another digit.
_MIN_LIMIT, _LIMIT_FACTOR, _LIMIT_POWER, _LIMIT_PER_PIXEL = 4.4, 1800, -1.5, 1.2
# In Cb and Cr, of which JPEG keeps a quarter of the pixels, times as far.
_CHANNEL_FACTORS = np.array([1, 1.5, 1.5], np.float32)
# And farther by this share of the range of a cell's surroundings: resampling moves edges.
_RANGE_SHARES = np.array([0.1, 0.4, 0.4], np.float32)
# The root mean square over all cells is at most this share of their contrast (standard deviation):
# two foggy landscapes are alike in all cells.
_MAX_SHARE_OF_CONTRAST = 0.6
# Only pairs whose luma, on an 8x8 grid, differs by at most this (root mean square) are compared.
# Copies at 0.7 of the size differ by up to 7.
_MAX_LUMA_DIFFERENCE = 8.0
_NUM_COMPONENTS = 8
_MAX_LEAF = 256
_BLOCK_BYTES = 16_000_000
_CHECKED_AT_ONCE = 1024
# Of one image: a thousand blank ones have half a million pairs, and a few each connect them.
_MAX_PAIRS = 8
_Bytes = npt.NDArray[np.uint8]
_Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Signature:
    """What two images are compared by.

    A digest of the bytes, width and height in pixels as they are stored, and the whole image on a
    grid `uint8 [16,16,3]` of luma, Cb and Cr.
    """

    digest: bytes
    size: tuple[int, int]
    grid: _Bytes

    @property
    def shorter_side(self) -> int:
        return min(self.size)

    def similarity(self, other: Signature) -> float:
        """1 where all cells are the same, 0 between black and white."""
        return 1 - float(np.abs(self.grid.astype(np.int16) - other.grid).mean()) / 255


@dataclass(frozen=True)
class Duplicates:
    """Groups of samples that are the same image, in the order of the splits.

    `signatures` are of those in groups, by `id` of the sample. `digests` of the bytes of every
    image that could be read, by the sample's key, show later whether it has changed; `sizes` are
    their widths and heights.
    """

    groups: tuple[tuple[Sample, ...], ...]
    signatures: dict[int, Signature]
    digests: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def is_exact(self, first: Sample, second: Sample) -> bool:
        """Whether two of a group are the same to the byte."""
        return self.signatures[id(first)].digest == self.signatures[id(second)].digest

    def similarity(self, first: Sample, second: Sample) -> float:
        """Of two of a group, 1 where they are exact copies."""
        return self.signatures[id(first)].similarity(self.signatures[id(second)])


def open_grids(cache_dir: Path) -> FeatureCache:
    """Grids of images seen before, so that a second run decodes nothing to find copies."""
    how = EngineInfo(f"pillow {importlib.metadata.version('pillow')}", "cpu", "uint8", 1, 1, 0.0)
    return FeatureCache(cache_dir, "luma and chroma grid, 3", how, _NUM_FLOATS)


def find_duplicates(
    splits: Splits, *, num_workers: int, cache: FeatureCache | None = None
) -> Duplicates:
    """Groups of copies within and across splits; unreadable images are in none.

    `cache` holds grids.
    """
    samples = [sample for _, of_split in splits.named() for sample in of_split]
    grids = np.zeros((len(samples), _GRID_SIDE, _GRID_SIDE, 3), np.uint8)
    sides = np.zeros(len(samples), np.int64)
    digests: dict[str, bytes] = {}
    sizes: dict[str, tuple[int, int]] = {}
    read = functools.partial(_read_signature, cache=cache)
    for index, found in enumerate(_map(read, samples, num_workers, "looking for copies")):
        if found is not None:
            signature, is_new = found
            grids[index], sides[index] = signature.grid, signature.shorter_side
            digests[samples[index].key] = signature.digest
            sizes[samples[index].key] = signature.size
            if cache is not None and is_new:
                cache.write([signature.digest], _pack(signature)[None])
    places = np.flatnonzero(sides)
    pairs = (
        (places[first], places[second])
        for first, second in _near_pairs(_coarse_luma(grids[places]))
    )
    groups = _connect(_copies(pairs, grids, sides))
    in_groups = {
        id(samples[index]): Signature(
            digests[samples[index].key], sizes[samples[index].key], grids[index].copy()
        )
        for group in groups
        for index in group
    }
    return Duplicates(
        tuple(tuple(samples[index] for index in group) for group in groups),
        in_groups,
        digests,
        sizes,
    )


def _read_signature(sample: Sample, cache: FeatureCache | None) -> tuple[Signature, bool] | None:
    """And whether it is new, not from the cache; None if the image cannot be read."""
    try:
        data = sample.read()
    except (OSError, ValueError):
        return None
    digest, packed = digest_image(data), np.empty(_NUM_FLOATS, np.float32)
    if cache is not None and cache.read(digest, packed):
        return _unpack(digest, packed), False
    signature = compute_signature(data)
    return None if signature is None else (signature, True)


def _pack(signature: Signature) -> Floats:
    """As the cache keeps it, `float32 [194]`: the bytes of the grid, four by four, and the size."""
    of_grid = np.ascontiguousarray(signature.grid).reshape(-1).view(np.float32)
    return np.append(of_grid, np.array(signature.size, np.float32))


def _unpack(digest: bytes, packed: Floats) -> Signature:
    grid = packed[:-2].view(np.uint8).reshape(_GRID_SIDE, _GRID_SIDE, 3)
    return Signature(digest, (int(packed[-2]), int(packed[-1])), grid)


def compute_signature(data: bytes) -> Signature | None:
    """None if `data` is no image."""
    try:
        opened = _WHOLE_IMAGE.open(data)
        pixels = Image.fromarray(_WHOLE_IMAGE.crop(opened))
    except ImageError:
        return None
    # In two steps: resized in one, it would depend more on the size resized from. The second one's
    # filter, as wide as four cells of the first, takes what edges lose by a shift of half a pixel.
    grid = pixels.convert("YCbCr").resize((_GRID_SIDE, _GRID_SIDE), Image.Resampling.BILINEAR)
    return Signature(digest_image(data), (opened.width, opened.height), np.asarray(grid))


def are_copies(first: _Bytes, second: _Bytes, sides: npt.NDArray[np.int64]) -> npt.NDArray[np.bool]:
    """Whether grids `[P,16,16,3]` show the same picture, of `sides` pixels `[P]` at least."""
    a, b = first.astype(np.float32), second.astype(np.float32)
    difference = np.abs(a - b)
    surroundings = _reach(np.maximum(a, b), np.maximum) - _reach(np.minimum(a, b), np.minimum)
    pixels = sides.astype(np.float32)
    noise = np.minimum(_LIMIT_FACTOR * pixels**_LIMIT_POWER, _LIMIT_PER_PIXEL * pixels)
    limit = np.maximum(_MIN_LIMIT, noise)
    limits = limit[:, None, None, None] * _CHANNEL_FACTORS
    is_near: npt.NDArray[np.bool] = (difference - _RANGE_SHARES * surroundings <= limits).all(
        axis=(1, 2, 3)
    )
    contrast = np.minimum(a.var(axis=(1, 2)).sum(axis=1), b.var(axis=(1, 2)).sum(axis=1))
    square = np.square(difference).mean(axis=(1, 2)).sum(axis=1)
    is_alike: npt.NDArray[np.bool] = square <= _MAX_SHARE_OF_CONTRAST**2 * contrast
    return is_near & is_alike


def _reach(grids: Floats, extremum: np.ufunc) -> Floats:
    """The extremum of each cell and its eight neighbours, in `[P,S,S,3]`."""
    padded = np.pad(grids, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = extremum(extremum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    reached: Floats = extremum(extremum(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])
    return reached


def _copies(
    pairs: Iterable[tuple[int, int]], grids: _Bytes, sides: npt.NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """The pairs that `are_copies`."""
    pairs = iter(pairs)
    while chunk := list(itertools.islice(pairs, _CHECKED_AT_ONCE)):
        first, second = np.array(chunk).T
        are = are_copies(grids[first], grids[second], np.minimum(sides[first], sides[second]))
        yield from itertools.compress(chunk, are)


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


def _coarse_luma(grids: _Bytes) -> _Bytes:
    """Luma on 8x8 grids, `uint8 [N,64]`, of grids `[N,16,16,3]`."""
    luma = grids[..., 0].astype(np.uint16)
    fours = luma[:, ::2, ::2] + luma[:, 1::2, ::2] + luma[:, ::2, 1::2] + luma[:, 1::2, 1::2]
    return ((fours + 2) // 4).astype(np.uint8).reshape(len(grids), _GRID_SIDE**2 // 4)


def _near_pairs(luma: _Bytes) -> Iterator[tuple[int, int]]:
    """Pairs of places in `[N,64]` that differ little, each image's nearest.

    Images are sorted into the leaves of a k-d tree over their principal components. There, two are
    at most as far apart as in all cells: a leaf is compared only with images near its bounding box.
    """
    if len(luma) < 2:
        return
    points = _project(luma)
    leaves = list(_split(points, np.arange(len(points))))
    order = np.concatenate(leaves)
    points, luma = points[order], luma[order]
    limit = _MAX_LUMA_DIFFERENCE**2 * luma.shape[1]
    start = 0
    for end in np.cumsum([len(leaf) for leaf in leaves]):
        low, high = points[start:end].min(axis=0), points[start:end].max(axis=0)
        gaps = np.maximum(0, np.maximum(points[end:] - high, low - points[end:]))
        # The projection is rounded.
        near = end + np.flatnonzero(np.square(gaps).sum(axis=1) <= 1.001 * limit)
        places = np.concatenate([np.arange(start, end), near])
        for first, second in _near_rows(luma[places], end - start, limit):
            yield int(order[places[first]]), int(order[places[second]])
        start = end


def _project(luma: _Bytes) -> Floats:
    """The first principal components, `float32 [N,8]`."""
    centered = luma.astype(np.float32) - 128
    _, vectors = np.linalg.eigh(np.cov(centered[:: -(-len(luma) // 10_000)], rowvar=False))
    return centered @ vectors[:, -_NUM_COMPONENTS:].astype(np.float32)


def _split(points: Floats, places: _Places) -> Iterator[_Places]:
    """`places` in halves, along the widest component, until they are small."""
    if len(places) <= _MAX_LEAF:
        yield places
        return
    widest = int(np.ptp(points[places], axis=0).argmax())
    half = len(places) // 2
    order = np.argpartition(points[places, widest], half)
    yield from _split(points, places[order[:half]])
    yield from _split(points, places[order[half:]])


def _near_rows(luma: _Bytes, num_rows: int, limit: float) -> Iterator[tuple[int, int]]:
    """Pairs of the first rows of `[M,64]` and later ones, block by block."""
    start = 0
    while start < num_rows:
        size = max(1, min(num_rows - start, _BLOCK_BYTES // (4 * (len(luma) - start))))
        # Around zero, float32 is exact enough for |a - b|² = |a|² + |b|² - 2ab.
        rest = luma[start:].astype(np.float32) - 128
        squares = np.square(rest).sum(axis=1)
        distances = rest[:size] @ (-2 * rest.T)
        distances += squares
        distances += squares[:size, None]
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
