"""Images → backbone features through the engine, decoding and computing at the same time, once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from finetune.data import Sample
from finetune.progress import progress_bar
from models.engine import Engine, Features
from models.preprocess import ImageError, Pixels, Preprocess


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features `float32 [N,F]` of the readable samples, in their order, and why the others could not be read."""

    features: Features
    unreadable: dict[str, str]


def extract_features(
    samples: Sequence[Sample], preprocess: Preprocess, engine: Engine, *, num_workers: int, description: str
) -> ExtractedFeatures:
    """Decode in `num_workers` threads, feed the engine its best batch, and keep both busy; memory holds a few batches only."""
    features = np.empty((len(samples), engine.num_features), np.float32)
    unreadable: dict[str, str] = {}
    num_done = 0
    in_flight: deque[tuple[Future[Features], int]] = deque()

    def collect() -> None:
        nonlocal num_done
        future, size = in_flight.popleft()
        features[num_done : num_done + size] = future.result()
        num_done += size

    with progress_bar(description, len(samples)) as advance:
        batch: list[Pixels] = []
        for sample, pixels in decode_all(samples, preprocess, num_workers, ahead=4 * engine.info.batch_size):
            advance(1)
            if isinstance(pixels, ImageError):
                unreadable[sample.key] = str(pixels)
                continue
            batch.append(pixels)
            if len(batch) == engine.info.batch_size:
                in_flight.append((engine.submit(np.stack(batch)), len(batch)))
                batch = []
            while len(in_flight) > engine.num_slots:
                collect()
        if batch:
            in_flight.append((engine.submit(np.stack(batch)), len(batch)))
        while in_flight:
            collect()
    return ExtractedFeatures(features[:num_done], unreadable)


def decode_all(
    samples: Sequence[Sample], preprocess: Preprocess, num_workers: int, ahead: int
) -> Iterator[tuple[Sample, Pixels | ImageError]]:
    """Each sample with its crop, or with the reason why there is none, in order; at most `ahead` + workers are decoded early."""

    def decode(sample: Sample) -> Pixels | ImageError:
        try:
            return preprocess(sample.read())
        except ImageError as error:
            return error
        except OSError as error:
            return ImageError(f"the file cannot be read: {error.strerror or error}")

    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as pool:
        window: deque[tuple[Sample, Future[Pixels | ImageError]]] = deque()
        for sample in samples:
            window.append((sample, pool.submit(decode, sample)))
            if len(window) > ahead + num_workers:
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
