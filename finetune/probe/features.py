"""Images → backbone features through the engine; decoding and computing overlap.

Only features that the cache does not hold are computed.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from finetune.config import BackboneOptions, CacheSettings, SharedOptions
from finetune.data.cache import FeatureCache, digest_image, trim
from finetune.data.splits import Sample, Splits
from finetune.data.views import Views
from finetune.terminal import progress_bar
from models.backbone.weights_file import check_weights_file, split_entry
from models.engine.engine import Engine, Features, Precision
from models.errors import GraftError, join_first
from models.images import MAX_PIXELS, ImageError, Pixels, read_max_pixels
from models.prepare_ahead import prepare_ahead
from models.prepared import Device, PreparedBackbone, prepare_backbone
from models.preprocess import Preprocess, View
from models.quantise import NUM_CALIBRATION_IMAGES, find_quantised, quantise
from models.sources import SplitName

logger = logging.getLogger("graft.features")

# Rows are written to the cache in groups of this many; a killed run loses at most one group.
_GROUP_ROWS = 32
_NUM_UNREADABLE_SHOWN = 10


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features `float32 [N,F]` of the readable samples in order; `unreadable`: key → reason."""

    features: Features
    unreadable: dict[str, str]


class SupportsRows(Protocol):
    """An array whose rows can be assigned to: NumPy's, or a file on disk."""

    def __setitem__(self, rows: Any, values: Features, /) -> None: ...


def _plain_crop(index: int) -> View | None:
    return None


def extract_features(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    engine: Engine,
    *,
    num_workers: int,
    description: str,
    cache: FeatureCache | None = None,
    draw: Callable[[int], View | None] = _plain_crop,
    out: SupportsRows | None = None,
    digests: Mapping[str, bytes] | None = None,
) -> ExtractedFeatures:
    """Features of `samples`, decoded in `num_workers` threads while the engine computes.

    `draw` gives the augmented view of the image at an index, None for the plain crop. With `out`,
    rows are assigned to it and the returned array has no columns, so that memory holds only a few
    batches. An image whose digest differs from `digests[key]` counts as unreadable.
    """
    features = np.empty((len(samples), engine.num_features if out is None else 0), np.float32)
    pipeline = _Pipeline(engine, features if out is None else out, features, cache)
    unreadable: dict[str, str] = {}
    num_ahead = 4 * engine.info.batch_size + num_workers
    row = 0
    with progress_bar(description, len(samples)) as advance:
        for sample, decoded in _decode_all(
            samples, preprocess, num_workers, num_ahead, cache, draw
        ):
            advance(1)
            if isinstance(decoded, ImageError):
                unreadable[sample.key] = str(decoded)
                continue
            if digests is not None and digests.get(sample.key) != decoded.digest:
                unreadable[sample.key] = "it has changed since the run began"
                continue
            crop = decoded.pixels
            if crop is None and (cache is None or not cache.read(decoded.digest, features[row])):
                # The cached row was damaged after it was indexed.
                crop = preprocess(sample.read(), view=decoded.view)
            if crop is not None:
                pipeline.add(row, decoded.digest, crop)
            row += 1
            pipeline.collect_finished()
        pipeline.finish()
    return ExtractedFeatures(features[:row], unreadable)


class _Pipeline:
    """Crops go to the engine in full batches; features go to their rows and to the cache."""

    def __init__(
        self, engine: Engine, out: SupportsRows, features: Features, cache: FeatureCache | None
    ) -> None:
        self._engine = engine
        self._out = out
        self._features = features
        self._cache = cache
        self._crops: list[Pixels] = []
        self._places: list[tuple[int, bytes]] = []
        self._in_flight: deque[tuple[Future[Features], list[tuple[int, bytes]]]] = deque()
        self._not_cached: list[tuple[int, bytes]] = []

    def add(self, row: int, digest: bytes, crop: Pixels) -> None:
        self._crops.append(crop)
        self._places.append((row, digest))
        if len(self._crops) == self._engine.info.batch_size:
            self._submit()

    def collect_finished(self) -> None:
        """Wait for the oldest batches while more are in flight than the engine works on."""
        while len(self._in_flight) > self._engine.num_slots:
            self._collect()

    def finish(self) -> None:
        if self._crops:
            self._submit()
        while self._in_flight:
            self._collect()
        self._write_to_cache()

    def _submit(self) -> None:
        self._in_flight.append((self._engine.submit(self._crops), self._places))
        self._crops, self._places = [], []

    def _collect(self) -> None:
        future, places = self._in_flight.popleft()
        self._out[[row for row, _ in places]] = future.result()
        self._not_cached.extend(places)
        if len(self._not_cached) >= _GROUP_ROWS:
            self._write_to_cache()

    def _write_to_cache(self) -> None:
        if self._cache is not None and self._not_cached:
            rows = [row for row, _ in self._not_cached]
            digests = [digest for _, digest in self._not_cached]
            self._cache.write(digests, self._features[rows])
        self._not_cached.clear()


def prepare_meanwhile(
    options: BackboneOptions, *, all_levels: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A context in which another process prepares the backbone that `prepare` will ask for.

    Raises GraftError where `--weights` names no file of weights, before any work.
    """
    if options.weights is not None:
        path, _ = split_entry(options.weights)
        check_weights_file(path)
    return prepare_ahead(
        options.backbone,
        weights=options.weights,
        pretrained=options.pretrained,
        image_size=options.image_size,
        cache_dir=options.enabled_cache_dir,
        all_levels=all_levels,
    )


def prepare(
    name: str,
    samples: Sequence[Sample],
    options: SharedOptions,
    scratch: Path,
    *,
    weights: Path | None = None,
    pretrained: bool = True,
    all_levels: bool = False,
) -> PreparedBackbone:
    """The pretrained backbone `name`, with `--precision int8` quantised on `samples`.

    With `all_levels` it gives the features of all its stages, where it shows them. Without
    `--cache` it is written to `scratch`. Raises GraftError where it cannot be had.
    """
    backbone = prepare_backbone(
        name,
        weights=weights,
        pretrained=pretrained,
        image_size=options.image_size,
        cache_dir=options.enabled_cache_dir,
        scratch_dir=scratch,
        all_levels=all_levels,
    )
    if options.stretch:
        backbone = backbone.stretched()
    logger.info("backbone %s, weights: %s", backbone.name, backbone.weights)
    if all_levels and len(backbone.level_sets) == 1:
        logger.info(
            "%s does not show its stages (forward_intermediates), so the head reads its last level",
            backbone.name,
        )
    if options.precision == "int8":
        return prepare_int8(backbone, samples, num_workers=options.workers)
    return backbone


def prepare_int8(
    backbone: PreparedBackbone, samples: Sequence[Sample], *, num_workers: int
) -> PreparedBackbone:
    """`backbone` in int8: the one kept beside it, else quantised on some of `samples`.

    Raises GraftError where none of them can be read.
    """
    quantised = find_quantised(backbone)
    if quantised is not None:
        return quantised
    logger.info("quantising %s to int8 (5 to 15 s) …", backbone.name)
    rows = np.linspace(0, len(samples) - 1, NUM_CALIBRATION_IMAGES).astype(int)
    chosen = [samples[row] for row in rows]
    crops = [
        decoded.pixels
        for _, decoded in _decode_all(
            chosen, backbone.preprocess, num_workers, num_workers, None, _plain_crop
        )
        if not isinstance(decoded, ImageError) and decoded.pixels is not None
    ]
    if not crops:
        raise GraftError(
            f"--precision int8: none of the {len(chosen)} training images that it is calibrated on "
            "can be read; look at them with finetune/audit.py, or choose another --precision"
        )
    quantised = quantise(backbone, np.stack(crops))
    logger.info("quantised to int8 on %d training images", len(crops))
    return quantised


def open_engine(backbone: PreparedBackbone, device: Device, precision: Precision) -> Engine:
    """The backbone's engine; what it chose is logged."""
    engine = backbone.open_engine(device, precision)
    logger.info("engine: %s", engine.info)
    return engine


def extract_splits(
    splits: Splits,
    backbone: PreparedBackbone,
    engine: Engine,
    *,
    num_workers: int,
    cache: CacheSettings | None,
    only: Sequence[SplitName] = ("train", "val", "test"),
    views: Views = Views(),  # noqa: B008 (frozen)
    unreadable: Literal["error", "warning", "ignored"] = "warning",
    digests: Mapping[str, bytes] | None = None,
) -> tuple[Splits, dict[SplitName, Features]]:
    """The splits without their unreadable images, and the features `float32 [N,F]` of each.

    With V `views` the training split has `[V·N,F]`: all plain crops, then all first augmented
    views, and so on. An image whose digest differs from `digests[key]` counts as unreadable.
    Raises GraftError where features are NaN or infinite, where an image is unreadable and that is
    an "error", and, unless they are "ignored", where leaving them out empties a class.
    """
    features: dict[SplitName, Features] = {}
    reasons: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        opened = None if cache is None else stack.enter_context(open_cache(cache, backbone, engine))
        for split, samples in splits.named():
            if split not in only:
                continue
            arrays = []
            for view in range(views.num if split == "train" else 1):
                which = f", augmented view {view} of {views.num - 1}" if view else ""
                extracted = extract_features(
                    samples,
                    backbone.preprocess,
                    engine,
                    num_workers=num_workers,
                    description=f"features of {split}{which}",
                    cache=opened,
                    draw=views.drawing(view),
                    digests=digests,
                )
                arrays.append(extracted.features)
                reasons |= extracted.unreadable
            readable = [sample for sample in samples if sample.key not in reasons]
            _check_finite(arrays, readable, backbone.name)
            features[split] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if opened is not None:
            hits, misses = opened.num_hits, opened.num_misses
            logger.info("features: %d from the cache, %d computed", hits, misses)
    if cache is not None:
        trim(cache.folder, cache.max_bytes)
    if unreadable != "ignored":
        _report_unreadable(reasons, is_error=unreadable == "error")
    return splits.without(reasons, check=unreadable != "ignored"), features


def open_cache(cache: CacheSettings, backbone: PreparedBackbone, engine: Engine) -> FeatureCache:
    """The kept features of this backbone on this engine."""
    return FeatureCache(cache.folder, backbone.fingerprint, engine.info, engine.num_features)


def _report_unreadable(reasons: Mapping[str, str], *, is_error: bool) -> None:
    if not reasons:
        return
    items = list(reasons.items())
    lines = [f"{len(items)} unreadable image{'' if len(items) == 1 else 's'}:"]
    lines += [f"  {key}: {reason}" for key, reason in items[:_NUM_UNREADABLE_SHOWN]]
    if len(items) > _NUM_UNREADABLE_SHOWN:
        num_more = len(items) - _NUM_UNREADABLE_SHOWN
        lines.append(
            f"  and {num_more} more; audit.html, of a run or of finetune/audit.py, has all"
        )
    message = "\n".join(lines)
    if is_error:
        raise GraftError(f"{message}\n(--strict stops here; without it they are left out)")
    logger.warning("%s\n(left out; --strict makes them an error)", message)


def _check_finite(arrays: Sequence[Features], samples: Sequence[Sample], name: str) -> None:
    is_broken = np.any([~np.isfinite(array.sum(axis=1)) for array in arrays], axis=0)
    if broken := [samples[int(index)].key for index in np.flatnonzero(is_broken)]:
        raise GraftError(
            f"--backbone {name}: its features are NaN or infinite for {len(broken)} of "
            f"{len(samples)} images ({join_first(broken)}); its weights or its code are broken"
        )


@dataclass(frozen=True)
class _Decoded:
    """`pixels` is None where the cache holds the features of `digest`."""

    digest: bytes
    view: View | None
    pixels: Pixels | None


def _decode_all(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    num_workers: int,
    num_ahead: int,
    cache: FeatureCache | None,
    draw: Callable[[int], View | None],
) -> Iterator[tuple[Sample, _Decoded | ImageError]]:
    """Each sample in order with its crop, or why it cannot be read; `num_ahead` decode ahead."""

    def decode(sample: Sample, index: int) -> _Decoded | ImageError:
        try:
            data, view = sample.read(), draw(index)
            digest = digest_image(data, view)
            is_cached = cache is not None and digest in cache
            if is_cached and read_max_pixels() < MAX_PIXELS:
                # It was kept under a higher limit, perhaps.
                preprocess.open(data)
            return _Decoded(digest, view, None if is_cached else preprocess(data, view=view))
        except ImageError as error:
            return error
        except OSError as error:
            return ImageError(f"the file cannot be read: {error.strerror or error}")
        except ValueError as error:  # a NUL in a path
            return ImageError(f"the file cannot be read: {error}")

    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as pool:
        window: deque[tuple[Sample, Future[_Decoded | ImageError]]] = deque()
        for index, sample in enumerate(samples):
            window.append((sample, pool.submit(decode, sample, index)))
            if len(window) > num_ahead:
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
