"""Imbalanced classes (`--balance`): weights that let each count the same, batches drawn by them."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from models.scores import Floats, Labels

logger = logging.getLogger("graft.balance")

# The largest class over the smallest: beyond, accuracy can be high without the rare classes.
_IMBALANCED_RATIO = 10


def class_weights(labels: Labels, num_classes: int) -> Floats:
    """Inverse to how often each class comes in `labels` `[N]`: `[C]`, 0 for a class without images.

    They are 1 on average over the images.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return np.where(
        counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0
    ).astype(np.float32)


def draw_balanced(
    order: npt.NDArray[np.int64], weights: Floats, start: float
) -> npt.NDArray[np.int64]:
    """Draw N images, each as often as its weight says, rounded up or down: `[N]`, in `order` `[N]`.

    `weights` `[N]` are by image and 1 on average. Systematic sampling: N points at equal distances,
    the first at `start` in [0, 1), on the images laid end to end in `order`. Drawn one by one, a
    third of a class would be missing from an epoch by chance.
    """
    ends = np.cumsum(weights[order], dtype=np.float64)
    points = (np.arange(len(order)) + start) * (ends[-1] / len(order))
    drawn: npt.NDArray[np.int64] = order[
        np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
    ]
    return drawn


def warn_if_imbalanced(labels: Labels, label_names: tuple[str, ...]) -> None:
    """Log a warning if the largest class of `labels` `[N]` is over ten times the smallest."""
    counts = np.bincount(labels, minlength=len(label_names))
    present = np.flatnonzero(counts)
    smallest, largest = present[counts[present].argmin()], present[counts[present].argmax()]
    if counts[largest] > _IMBALANCED_RATIO * counts[smallest]:
        logger.warning(
            "imbalanced classes: %s has %s training images, %s has %s; if rare classes matter as "
            "much, --balance weights lets each class count the same",
            label_names[largest],
            f"{counts[largest]:,}",
            label_names[smallest],
            f"{counts[smallest]:,}",
        )
