"""Would more images help: the probe on parts of the training features, which are there already."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.evaluation.interval import Interval
from finetune.evaluation.metrics import Shares
from finetune.probe.solve import Probe, solve_head
from finetune.tasks.task import Task
from models.engine.engine import Features
from models.scores import Floats, Labels

_FRACTIONS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class LearningCurve:
    """Validation scores of probes on 25, 50, 75 and 100 % of the images; what twice as many add.

    `metric` names the score. `gain` continues a power law through the four errors (Hestness et al.
    2017, arXiv 1712.00409). Its 95 % `interval` is over the validation images and over how well the
    four lie on a line; it does not cover how far new images may differ from these.
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
        half = f"with half the images the probe scores {self.accuracies[1]:.4f}"
        low, high = 100 * self.interval.low, 100 * self.interval.high
        if low <= 0:
            return f"{half}; doubling them is predicted to add 0 to {max(high, 0):.1f} points"
        gain = f"about {100 * self.gain:.1f} points ({low:.1f} to {high:.1f})"
        return f"{half}; doubling them is predicted to add {gain}"


def measure_learning_curve(
    features: Features,
    labels: Labels,
    probe: Probe,
    val_features: Features,
    val_labels: Labels,
    task: Task,
    *,
    seed: int,
) -> LearningCurve:
    """`probe` was solved on all of `features` `[V·N,F]`, V views of N images with `labels`.

    Each part is seeded, stratified and contained in the next. Its strength of regularisation is
    kept as a prior: L2 on the mean loss grows as the images get fewer.
    """
    num_views, num_classes = len(features) // len(labels), len(probe.bias)
    ranks = task.nested_ranks(labels, len(_FRACTIONS) + 1, seed)
    num_images: list[int] = []
    logits: list[Floats] = []
    start = None
    for fraction in _FRACTIONS:
        chosen = np.flatnonzero(ranks < fraction)
        rows = np.concatenate([chosen + view * len(labels) for view in range(num_views)])
        l2 = probe.l2 * len(labels) / len(chosen)
        all_labels = np.concatenate([labels[chosen]] * num_views)
        start = solve_head(
            features[rows], all_labels, num_classes, l2, start, probe.class_weights, task
        )
        weight, bias = start
        num_images.append(len(chosen))
        logits.append(val_features @ weight.T + bias)
    num_images.append(len(labels))
    logits.append(probe.logits(val_features))
    scores = task.resampled_scores(logits, val_labels)
    return continue_curve(num_images, scores, len(val_labels), task.metric)


def continue_curve(
    num_images: list[int], accuracies: Shares, num_val: int, metric: str
) -> LearningCurve:
    """From the heads' scores `[1+B,4]`: on all validation images, then on resampled ones."""
    # Half an image more is wrong, so that the error of a head without a mistake has a logarithm.
    errors = np.log((1 - accuracies) + 0.5 / num_val)
    sizes = np.log(num_images)
    centred = sizes - sizes.mean()
    slopes = (errors @ centred) / max(float(centred @ centred), 1e-12)
    # Four points leave two degrees of freedom for the spread about the line: parts drawn otherwise
    # would have given other errors.
    residuals = errors[0] - errors[0].mean() - slopes[0] * centred
    spread = math.sqrt(float(residuals @ residuals) / 2 / max(float(centred @ centred), 1e-12))
    slopes[1:] += spread * np.random.default_rng(0).standard_t(2, len(slopes) - 1)
    at_all = errors.mean(axis=1) + slopes * centred[-1]
    # No error is more than 1.
    gains = np.exp(np.minimum(at_all, 0)) - np.exp(np.minimum(at_all + slopes * np.log(2), 0))
    return LearningCurve(
        tuple(num_images),
        tuple(map(float, accuracies[0])),
        float(gains[0]),
        Interval.of(gains[1:]),
        metric,
    )
