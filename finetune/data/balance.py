"""Classes of uneven size: the weights that let each count the same, and the images drawn by them (`--balance`)."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from models.scores import Floats, Labels

logger = logging.getLogger("graft.balance")

# The largest class over the smallest: from here on accuracy can be high without the rare classes.
_UNEVEN = 10


def class_weights(labels: Labels, num_classes: int) -> Floats:
    """Inverse to how often each class comes in `labels` `[N]`: `[C]`, 1 on average over the images, 0 for a class without any."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.where(
        counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0
    ).astype(np.float32)


def draw_balanced(
    order: npt.NDArray[np.int64], weights: Floats, start: float
) -> npt.NDArray[np.int64]:
    """As many images as `order` `[N]` holds, each as often as its weight says, rounded up or down: `[N]`, those of an image side by side.

    `weights` `[N]` are by image and 1 on average. Systematic sampling: N points at equal distances, the first at `start` in [0, 1), on
    the images laid end to end in `order`. Drawn one by one, a third of a class would be missing from an epoch by chance.
    """
    ends = np.cumsum(weights[order], dtype=np.float64)
    points = (np.arange(len(order)) + start) * (ends[-1] / len(order))
    drawn: npt.NDArray[np.int64] = order[
        np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
    ]
    return drawn


def say_if_uneven(labels: Labels, label_names: tuple[str, ...]) -> None:
    """Name the option where the classes of the training images, `labels` `[N]`, are so uneven that one may want it."""
    counts = np.bincount(labels, minlength=len(label_names))
    present = np.flatnonzero(counts)
    smallest, largest = present[counts[present].argmin()], present[counts[present].argmax()]
    if counts[largest] > _UNEVEN * counts[smallest]:
        logger.warning(
            "uneven classes: %s has %s training images, %s has %s; where rare classes matter as much, --balance weights lets each class "
            "count the same",
            label_names[largest],
            f"{counts[largest]:,}",
            label_names[smallest],
            f"{counts[smallest]:,}",
        )
