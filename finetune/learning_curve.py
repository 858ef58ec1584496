"""Would more images help: the probe on a part of the training features, which are there already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluate import Interval, draw_counts
from finetune.probe import Labels, Probe, solve_head
from models.engine import Features

_FRACTIONS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class LearningCurve:
    """Validation accuracy of probes on 25, 50, 75 and 100 % of the training images, and what twice as many are expected to add.

    `gain` continues a power law through the four errors (Hestness et al. 2017, arXiv 1712.00409); its 95 % `interval` is over the
    validation images, so it knows nothing of how far new images may differ from these.
    """

    num_images: tuple[int, ...]
    accuracies: tuple[float, ...]
    gain: float
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_images": list(self.num_images),
            "accuracies": list(self.accuracies),
            "doubling": {"gain": self.gain, "interval": self.interval.to_list()},
        }

    def __str__(self) -> str:
        half = f"half the images would have given the probe {self.accuracies[1]:.4f}"
        low, high = 100 * self.interval.low, 100 * self.interval.high
        if low <= 0:
            return f"{half}; doubling them is worth less than this validation split can show ({max(high, 0):.1f} points at most)"
        return f"{half}; doubling them is worth about {100 * self.gain:.1f} points ({low:.1f} to {high:.1f})"


def measure_learning_curve(
    features: Features, labels: Labels, probe: Probe, val_features: Features, val_labels: Labels, *, seed: int
) -> LearningCurve:
    """`probe` was solved on all of `features` `[V·N,F]` with labels `[N]`; each part is a larger one's, seeded and stratified.

    Its strength of regularisation is kept as a prior: L2 on the mean loss grows as the images get fewer.
    """
    num_views, num_classes = len(features) // len(labels), len(probe.bias)
    ranks = _rank(labels, seed)
    num_images, is_right, start = [], [], None
    for fraction in _FRACTIONS:
        chosen = np.flatnonzero(ranks < fraction)
        rows = np.concatenate([chosen + view * len(labels) for view in range(num_views)])
        l2 = probe.l2 * len(labels) / len(chosen)
        start = solve_head(features[rows], np.tile(labels[chosen], num_views), num_classes, l2, start, probe.class_weights)
        weight, bias = start
        num_images.append(len(chosen))
        is_right.append((val_features @ weight.T + bias).argmax(axis=1) == val_labels)
    num_images.append(len(labels))
    is_right.append(probe.logits(val_features).argmax(axis=1) == val_labels)
    return _continue_curve(num_images, np.stack(is_right))


def _rank(labels: Labels, seed: int) -> npt.NDArray[np.float64]:
    """For each sample the share of its class that comes before it in a random order, `[N]`: below 0.5 is half of every class."""
    generator = np.random.default_rng(seed)
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        ranks[members] = np.arange(len(members)) / len(members)
    return ranks


def _continue_curve(num_images: list[int], is_right: npt.NDArray[np.bool_]) -> LearningCurve:
    """From which of the validation images `[4,N]` each head gets right."""
    # All that the four accuracies depend on is how many images are of each of the 16 kinds of right and wrong.
    kinds = (1 << np.arange(len(is_right))) @ is_right
    counts = np.bincount(kinds, minlength=1 << len(is_right))
    is_right_of_kind = (np.arange(len(counts))[:, None] >> np.arange(len(is_right))) & 1
    accuracies = np.concatenate([counts[None], draw_counts(counts)]) @ is_right_of_kind / len(kinds)
    # Half an image more is wrong, so that a head without a mistake has a logarithm.
    errors = np.log((1 - accuracies) + 0.5 / len(kinds))
    sizes = np.log(num_images)
    centred = sizes - sizes.mean()
    slopes = (errors @ centred) / max(float(centred @ centred), 1e-12)
    at_all = errors.mean(axis=1) + slopes * centred[-1]
    gains = np.exp(at_all) - np.exp(at_all + slopes * np.log(2))
    return LearningCurve(tuple(num_images), tuple(map(float, accuracies[0])), float(gains[0]), Interval.of(gains[1:]))
