"""Images unlike all others: far from their neighbours in feature space.

By the distance to the fifth nearest other image (Ramaswamy, Rastogi & Shim, SIGMOD 2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from finetune.auditing.findings import Finding
from finetune.data.splits import Splits
from models.engine.engine import Features
from models.scores import Floats
from models.sources import SplitName

# Neighbours are looked for among so many images, drawn by chance: time grows with the number of
# images, not with its square.
_NUM_REFERENCES = 2000
_NUM_NEIGHBOURS = 5
# Outliers are farther than the median by so many robust standard deviations (1.4826 times the
# median absolute deviation), and never more than this fraction of all.
_MIN_DEVIATIONS = 3.5
_MAX_FRACTION = 0.01


def find_outliers(splits: Splits, features: Mapping[SplitName, Features]) -> Iterator[Finding]:
    """The farthest first; `features` are `[N,F]` of each split, plain views first."""
    samples = [(split, sample) for split, of_split in splits.named() for sample in of_split]
    distances = _neighbour_distances(
        [features[split][: len(of_split)] for split, of_split in splits.named()]
    )
    median = float(np.median(distances))
    spread = 1.4826 * float(np.median(np.abs(distances - median)))
    max_outliers = max(1, int(len(samples) * _MAX_FRACTION))
    for index in np.argsort(-distances, kind="stable")[:max_outliers]:
        distance = float(distances[index])
        if distances[index] - median <= _MIN_DEVIATIONS * spread:
            break
        split, sample = samples[index]
        detail = f"at distance {distance:.2f} from its neighbours, others at {median:.2f}"
        yield Finding("outlier", split, splits.describe(sample), detail, distance, sample)


def _neighbour_distances(features: Sequence[Features]) -> Floats:
    """Cosine distances `[N]` of centred features `[N,F]`, in parts, to the fifth neighbour."""
    starts = np.cumsum([0, *(len(part) for part in features)])
    num_images = int(starts[-1])
    chosen = np.sort(
        np.random.default_rng(0).choice(num_images, min(num_images, _NUM_REFERENCES), replace=False)
    )
    drawn = [
        part[chosen[(chosen >= start) & (chosen < start + len(part))] - start]
        for part, start in zip(features, starts, strict=False)
    ]
    center = features[0].mean(axis=0)
    references = _normalise(np.concatenate(drawn) - center)
    distances: list[Floats] = []
    start = 0
    for part in features:
        for block in (part[first : first + 1024] for first in range(0, len(part), 1024)):
            cosines = _normalise(block - center) @ references.T
            # An image is not its own neighbour.
            itself = np.flatnonzero((chosen >= start) & (chosen < start + len(block)))
            cosines[chosen[itself] - start, itself] = -1
            nearest = min(_NUM_NEIGHBOURS, cosines.shape[1])
            distances.append(1 - np.partition(cosines, -nearest, axis=1)[:, -nearest])
            start += len(block)
    return np.concatenate(distances)


def _normalise(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
