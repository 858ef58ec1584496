"""Images → backbone features through the engine, decoding and computing at the same time, and only what the cache does not hold."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune.config import BackboneOptions, SharedOptions
from finetune.data.cache import FeatureCache, digest_image, trim
from finetune.data.splits import Sample, Splits
from finetune.data.views import Augment, draw_view
from finetune.terminal import progress_bar
from models.engine.engine import Engine, Features
from models.errors import GraftError, join_first
from models.prepare_ahead import prepare_ahead
from models.prepared import PreparedBackbone, prepare_backbone
from models.preprocess import ImageError, Pixels, Preprocess, View
from models.quantise import NUM_CALIBRATION_IMAGES, find_quantised, quantise
from models.sources import SplitName

logger = logging.getLogger("graft.features")

# Rows are written to the cache in groups of this many; what a killed run loses.
_GROUP = 32


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features `float32 [N,F]` of the readable samples, in their order, and why the others could not be read."""

    features: Features
    unreadable: dict[str, str]


class SupportsRows(Protocol):
    """What rows of features can be assigned to."""

    def __setitem__(self, rows: Any, values: Features, /) -> None: ...


@dataclass(frozen=True)
class _Decoded:
    """A sample's digest, and its crop unless the cache holds its features."""

    digest: bytes
    view: View | None
    pixels: Pixels | None


def extract_features(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    engine: Engine,
    *,
    num_workers: int,
    description: str,
    cache: FeatureCache | None = None,
    draw: Callable[[int], View | None] = lambda index: None,
    out: SupportsRows | None = None,
    digests: Mapping[str, bytes] | None = None,
) -> ExtractedFeatures:
    """Decode in `num_workers` threads, feed the engine its best batch, and keep both busy.

    `draw` gives the augmented view of the image at an index. Memory holds the features and a few batches, whatever the number of
    images; with `out` not even the features: rows are assigned to it, and an array without columns is returned. An image whose plain
    digest is not the one in `digests` under its key is unreadable.
    """
    features = np.empty((len(samples), engine.num_features if out is None else 0), np.float32)
    rows_out: SupportsRows = features if out is None else out
    unreadable: dict[str, str] = {}
    size = engine.info.batch_size
    in_flight: deque[tuple[Future[Features], list[int], list[bytes]]] = deque()
    unwritten: list[tuple[bytes, int]] = []
    batch: list[tuple[int, _Decoded]] = []
    row = 0

    def submit() -> None:
        nonlocal batch
        crops = [decoded.pixels for _, decoded in batch if decoded.pixels is not None]
        in_flight.append(
            (
                engine.submit(crops),
                [at for at, _ in batch],
                [decoded.digest for _, decoded in batch],
            )
        )
        batch = []

    def collect() -> None:
        future, rows, digests = in_flight.popleft()
        rows_out[rows] = future.result()
        unwritten.extend(zip(digests, rows, strict=True))
        if len(unwritten) >= _GROUP:
            write()

    def write() -> None:
        if cache is not None and unwritten:
            cache.write([digest for digest, _ in unwritten], features[[at for _, at in unwritten]])
        unwritten.clear()

    with progress_bar(description, len(samples)) as advance:
        for sample, decoded in _decode_all(
            samples, preprocess, num_workers, 4 * size + num_workers, cache, draw
        ):
            advance(1)
            if isinstance(decoded, ImageError):
                unreadable[sample.key] = str(decoded)
                continue
            if digests is not None and digests.get(sample.key) != decoded.digest:
                unreadable[sample.key] = "it has changed since the run began"
                continue
            if decoded.pixels is not None:
                batch.append((row, decoded))
            elif cache is None or not cache.read(decoded.digest, features[row]):
                # Damaged on disk since it was indexed: computed again.
                batch.append(
                    (
                        row,
                        _Decoded(
                            decoded.digest,
                            decoded.view,
                            preprocess(sample.read(), view=decoded.view),
                        ),
                    )
                )
            row += 1
            if len(batch) == size:
                submit()
            while len(in_flight) > engine.num_slots:
                collect()
        if batch:
            submit()
        while in_flight:
            collect()
        write()
    return ExtractedFeatures(features[:row], unreadable)


def prepare_meanwhile(options: BackboneOptions) -> contextlib.AbstractContextManager[None]:
    """Within it another process makes what `prepare` will ask for, where it can."""
    cache_dir = options.cache_dir if options.cache else None
    return prepare_ahead(
        options.backbone,
        weights=options.weights,
        pretrained=options.pretrained,
        image_size=options.image_size,
        cache_dir=cache_dir,
    )


def prepare(
    name: str, samples: Sequence[Sample], options: SharedOptions, scratch: Path, **weights: Any
) -> PreparedBackbone:
    """The pretrained backbone as the options ask for it, in int8 calibrated on `samples`; `weights` as `prepare_backbone` takes them."""
    cache_dir = options.cache_dir if options.cache else None
    backbone = prepare_backbone(
        name, image_size=options.image_size, cache_dir=cache_dir, scratch_dir=scratch, **weights
    )
    logger.info("backbone %s, weights: %s", backbone.name, backbone.weights)
    return prepare_int8(backbone, samples, options) if options.precision == "int8" else backbone


def prepare_int8(
    backbone: PreparedBackbone, samples: Sequence[Sample], options: SharedOptions
) -> PreparedBackbone:
    """The backbone in int8, kept beside the float one, else quantised on `samples`."""
    quantised = find_quantised(backbone)
    if quantised is None:
        logger.info("quantising %s to int8 (5 to 15 s) …", backbone.name)
        chosen = [
            samples[index]
            for index in np.linspace(0, len(samples) - 1, NUM_CALIBRATION_IMAGES).astype(int)
        ]
        decoded = _decode_all(
            chosen, backbone.preprocess, options.workers, options.workers, None, lambda index: None
        )
        crops = [
            item.pixels
            for _, item in decoded
            if not isinstance(item, ImageError) and item.pixels is not None
        ]
        if not crops:
            raise GraftError(
                f"--precision int8: none of {len(chosen)} training images can be read to calibrate on"
            )
        quantised = quantise(backbone, np.stack(crops))
        logger.info("quantised to int8 on %d training images", len(crops))
    return quantised


def open_engine(backbone: PreparedBackbone, options: SharedOptions) -> Engine:
    """The backbone's engine as the options ask for it; what it chose is logged."""
    engine = backbone.open_engine(options.device, options.precision)
    logger.info("engine: %s", engine.info)
    return engine


def extract_splits(
    splits: Splits,
    backbone: PreparedBackbone,
    engine: Engine,
    options: SharedOptions,
    *,
    only: Sequence[SplitName] = ("train", "val", "test"),
    num_views: int = 1,
    augment: Augment = "none",
    keep: bool = True,
    check: bool = True,
    digests: Mapping[str, bytes] | None = None,
) -> tuple[Splits, dict[SplitName, Features]]:
    """Features of each split in `only`, and the splits less their unreadable images, one that is not what it is in `digests` among them.

    With `num_views` V the training split has `[V·N,F]`: all plain crops, then V - 1 augmented views of all. `keep` allows the cache. With
    `check` unreadable images are told of, and GraftError is raised on any under `--strict`, or where they leave a class empty.
    """
    features: dict[SplitName, Features] = {}
    unreadable: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        cache = None
        if options.cache and keep:
            cache = stack.enter_context(
                FeatureCache(
                    options.cache_dir, backbone.fingerprint, engine.info, engine.num_features
                )
            )
        for split, samples in splits.named():
            if split not in only:
                continue
            views = []
            for view in range(num_views if split == "train" else 1):
                extracted = extract_features(
                    samples,
                    backbone.preprocess,
                    engine,
                    num_workers=options.workers,
                    description=f"features of {split}"
                    + (f", augmented view {view} of {num_views - 1}" if view else ""),
                    cache=cache,
                    draw=functools.partial(
                        draw_view, augment if view else "none", options.seed, view
                    ),
                    digests=digests,
                )
                views.append(extracted.features)
                unreadable |= extracted.unreadable
            _check_finite(
                views, [sample for sample in samples if sample.key not in unreadable], backbone
            )
            features[split] = views[0] if len(views) == 1 else np.concatenate(views)
        if cache is not None:
            logger.info(
                "features: %d from the cache, %d computed", cache.num_hits, cache.num_misses
            )
    if options.cache:
        trim(options.cache_dir, int(options.cache_gb * 1e9))
    if unreadable and check:
        shown = "\n".join(f"  {key}: {reason}" for key, reason in list(unreadable.items())[:10])
        more = f"\n  and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        message = f"{len(unreadable)} unreadable image{'' if len(unreadable) == 1 else 's'}:\n{shown}{more}"
        if options.strict:
            raise GraftError(f"{message}\n(--strict stops here; without it they are left out)")
        logger.warning("%s\n(left out; --strict makes them an error)", message)
    return splits.without(unreadable, check=check), features


def _check_finite(
    views: Sequence[Features], samples: Sequence[Sample], backbone: PreparedBackbone
) -> None:
    is_broken = np.any([~np.isfinite(view.sum(axis=1)) for view in views], axis=0)
    if broken := [samples[int(index)].key for index in np.flatnonzero(is_broken)]:
        raise GraftError(
            f"--backbone {backbone.name}: its features are NaN or infinite for {len(broken)} of {len(samples)} images "
            f"({join_first(broken)}); its weights or its code are broken"
        )


def _decode_all(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    num_workers: int,
    ahead: int,
    cache: FeatureCache | None,
    draw: Callable[[int], View | None],
) -> Iterator[tuple[Sample, _Decoded | ImageError]]:
    """Each sample, in order, with its crop or why there is none; at most `ahead` are decoded before they are asked for."""

    def decode(sample: Sample, index: int) -> _Decoded | ImageError:
        try:
            data, view = sample.read(), draw(index)
            digest = digest_image(data, view)
            return _Decoded(
                digest,
                view,
                None if cache is not None and digest in cache else preprocess(data, view=view),
            )
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
            if len(window) > ahead:
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
