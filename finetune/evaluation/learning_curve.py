"""Would more images help: the probe on a part of the training features, which are there already."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.strata import stratify_folds
from finetune.evaluation.interval import Interval, draw_counts, draw_weights
from finetune.evaluation.label_metrics import (
    Shares,
    mean_of_present,
    measure_average_precision,
    num_resamples,
)
from finetune.probe.solve import Probe, solve_head
from models.engine.engine import Features
from models.scores import Floats, Labels

_FRACTIONS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class LearningCurve:
    """Validation accuracy (or what else `metric` names) of probes on 25, 50, 75 and 100 % of the images, and what twice as many would add.

    `gain` continues a power law through the four errors (Hestness et al. 2017, arXiv 1712.00409); its 95 % `interval` is over the
    validation images and over how well the four lie on a line, so it knows nothing of how far new images may differ from these.
    """

    num_images: tuple[int, ...]
    accuracies: tuple[float, ...]
    gain: float
    interval: Interval
    metric: str = "accuracy"

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_images": list(self.num_images),
            "accuracies" if self.metric == "accuracy" else self.metric: list(self.accuracies),
            "doubling": {"gain": self.gain, "interval": self.interval.to_list()},
        }

    def __str__(self) -> str:
        half = f"half the images would have given the probe {self.accuracies[1]:.4f}"
        low, high = 100 * self.interval.low, 100 * self.interval.high
        if low <= 0:
            return (
                f"{half}; doubling them may be worth nothing, and {max(high, 0):.1f} points at most"
            )
        return f"{half}; doubling them is worth about {100 * self.gain:.1f} points ({low:.1f} to {high:.1f})"


def measure_learning_curve(
    features: Features,
    labels: Labels,
    probe: Probe,
    val_features: Features,
    val_labels: Labels,
    *,
    seed: int,
) -> LearningCurve:
    """`probe` was solved on all of `features` `[V·N,F]` with labels `[N]` or `[N,C]`; each part is a larger one's, seeded and stratified.

    Its strength of regularisation is kept as a prior: L2 on the mean loss grows as the images get fewer.
    """
    num_views, num_classes = len(features) // len(labels), len(probe.bias)
    ranks = _rank(labels, seed)
    num_images: list[int] = []
    logits: list[Floats] = []
    start = None
    for fraction in _FRACTIONS:
        chosen = np.flatnonzero(ranks < fraction)
        rows = np.concatenate([chosen + view * len(labels) for view in range(num_views)])
        l2 = probe.l2 * len(labels) / len(chosen)
        all_labels = np.concatenate([labels[chosen]] * num_views)
        start = solve_head(features[rows], all_labels, num_classes, l2, start, probe.class_weights)
        weight, bias = start
        num_images.append(len(chosen))
        logits.append(val_features @ weight.T + bias)
    num_images.append(len(labels))
    logits.append(probe.logits(val_features))
    if labels.ndim == 2:
        weights = draw_weights(len(val_labels), num_resamples(val_labels))
        weights[0] = 1  # the images as they are
        precisions = [measure_average_precision(each, val_labels, weights) for each in logits]
        means = np.stack([mean_of_present(each) for each in precisions], axis=1)
        return _continue_curve(num_images, means, len(val_labels), "mean_average_precision")
    return _continue_curve(
        num_images,
        _accuracies(np.stack([each.argmax(axis=1) == val_labels for each in logits])),
        len(val_labels),
    )


def _rank(labels: Labels, seed: int) -> npt.NDArray[np.float64]:
    """For each sample the share of its class that comes before it in a random order, `[N]`: below 0.5 is half of every class."""
    if labels.ndim == 2:
        return np.asarray(stratify_folds(labels, len(_FRACTIONS) + 1, seed) / (len(_FRACTIONS) + 1))
    generator = np.random.default_rng(seed)
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        ranks[members] = np.arange(len(members)) / len(members)
    return ranks


def _accuracies(is_right: npt.NDArray[np.bool_]) -> Shares:
    """Of the heads, `[1+B,4]`: on all images and resampled, from which of them `[4,N]` each head gets right."""
    # All that the four accuracies depend on is how many images are of each of the 16 kinds of right and wrong.
    kinds = (1 << np.arange(len(is_right))) @ is_right
    counts = np.bincount(kinds, minlength=1 << len(is_right))
    is_right_of_kind = (np.arange(len(counts))[:, None] >> np.arange(len(is_right))) & 1
    return np.asarray(
        np.concatenate([counts[None], draw_counts(counts)]) @ is_right_of_kind / len(kinds)
    )


def _continue_curve(
    num_images: list[int], accuracies: Shares, num_val: int, metric: str = "accuracy"
) -> LearningCurve:
    """From the heads' accuracies `[1+B,4]` on all validation images, and on them resampled."""
    # Half an image more is wrong, so that a head without a mistake has a logarithm.
    errors = np.log((1 - accuracies) + 0.5 / num_val)
    sizes = np.log(num_images)
    centred = sizes - sizes.mean()
    slopes = (errors @ centred) / max(float(centred @ centred), 1e-12)
    # Of four points, two degrees of freedom are left for what is no line: parts drawn otherwise would have given other errors.
    residuals = errors[0] - errors[0].mean() - slopes[0] * centred
    spread = math.sqrt(float(residuals @ residuals) / 2 / max(float(centred @ centred), 1e-12))
    slopes[1:] += spread * np.random.default_rng(0).standard_t(2, len(slopes) - 1)
    at_all = errors.mean(axis=1) + slopes * centred[-1]
    # No error is more than all.
    gains = np.exp(np.minimum(at_all, 0)) - np.exp(np.minimum(at_all + slopes * np.log(2), 0))
    return LearningCurve(
        tuple(num_images),
        tuple(map(float, accuracies[0])),
        float(gains[0]),
        Interval.of(gains[1:]),
        metric,
    )
