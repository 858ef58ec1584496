"""Calibration of any number of labels per image: a temperature, and a threshold for each label.

There is no conformal threshold here, and no `unsure`: an image without labels is an answer like any
other, and a per-label threshold cannot guarantee coverage of the whole label set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation.calibration import (
    Bools,
    Reliability,
    describe_error,
    measure_reliability,
    minimise_over_temperature,
)
from models.scores import Floats, Labels, sigmoid
from models.sources import SplitName


@dataclass(frozen=True)
class ThresholdCalibration:
    """The temperature before sigmoid, and the least score `[C]` at which an answer names a label.

    `basis` names the images that both were fitted on.
    """

    temperature: float
    thresholds: Floats
    basis: str

    def scores(self, logits: Floats) -> Floats:
        """Logits `[N,C]` → probabilities `[N,C]`, after temperature."""
        return sigmoid(logits / np.float32(self.temperature))

    def answers(self, logits: Floats) -> Bools:
        """The labels whose score reaches their threshold, `[N,C]`."""
        return np.asarray(self.scores(logits) >= self.thresholds)

    def describe_answers(self) -> str:
        """Which labels the service's answers name."""
        low, high = self.thresholds.min(), self.thresholds.max()
        return (
            f"An answer names the labels whose score, after temperature {self.temperature:.3f}, "
            f"reaches a threshold of their own ({low:.3f} to {high:.3f}): the one of best F1 on "
            f"{self.basis}."
        )

    def to_checkpoint(self) -> dict[str, Any]:
        return {"task": "multi-label", "thresholds": self.thresholds.tolist()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "thresholds": self.thresholds.tolist(),
            "fitted_on": self.basis,
        }


@dataclass(frozen=True)
class ThresholdQuality:
    """Calibration error on held-out images.

    Reliability is of all decisions, an image and a label each; `answers` `[N,C]` are the labels
    that the answers name.
    """

    before: Reliability
    after: Reliability
    answers: Bools
    columns: Mapping[str, str] = field(default_factory=dict)
    figures: list[tuple[str, str, str]] = field(default_factory=list)

    def describe(self) -> str:
        """One line for people."""
        return describe_error(self)

    def to_dict(self) -> dict[str, Any]:
        return {"error_before_temperature": self.before.error, "error": self.after.error}


def calibrate_probe(
    out_of_fold_logits: Floats,
    temperature: float,
    train_labels: Labels,
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
) -> tuple[ThresholdCalibration, dict[SplitName, ThresholdQuality]]:
    """Fit on a probe's out-of-fold logits `[N,C]`, and measure on every split of `logits`."""
    basis = f"out-of-fold predictions of {len(train_labels):,} training images"
    calibration = _fit(out_of_fold_logits, train_labels, basis, temperature)
    return calibration, {
        split: _measure(logits[split], labels[split], calibration) for split in logits
    }


def calibrate_trained(
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    folds: npt.NDArray[np.int64],
) -> tuple[ThresholdCalibration, dict[SplitName, ThresholdQuality]]:
    """Fit on "val", which is measured by cross-validation over `folds` `[N]`.

    For the reasons, see `calibrate_trained` in conformal.py.
    """
    val_logits, val_labels = logits["val"], labels["val"]
    basis = f"{len(val_labels):,} validation images, which also chose the epoch"
    calibration = _fit(val_logits, val_labels, basis, fit_temperature(val_logits, val_labels))
    quality = {split: _measure(logits[split], labels[split], calibration) for split in logits}
    scores, answers = np.empty_like(val_logits), np.empty(val_logits.shape, bool)
    for fold in range(int(folds.max()) + 1):
        others = folds != fold
        other_logits, other_labels = val_logits[others], val_labels[others]
        temperature = fit_temperature(other_logits, other_labels)
        fitted = _fit(other_logits, other_labels, "", temperature)
        scores[~others] = fitted.scores(val_logits[~others])
        answers[~others] = fitted.answers(val_logits[~others])
    before = measure_label_reliability(sigmoid(val_logits), val_labels)
    after = measure_label_reliability(scores, val_labels)
    quality["val"] = ThresholdQuality(before, after, answers)
    return calibration, quality


def best_thresholds(scores: Floats, labels: Labels) -> Floats:
    """For each label of scores and labels `[N,C]` the threshold of best F1, `[C]`.

    It is halfway to the next lower score; 0.5 for a label that no image has.
    """
    thresholds = np.full(scores.shape[1], 0.5, np.float32)
    counts = np.arange(1, len(scores) + 1)
    for label in np.flatnonzero(labels.any(axis=0)):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked = np.append(scores[order, label], np.float32(0))
        has_label = labels[order, label]
        f1 = 2 * has_label.cumsum() / (counts + has_label.sum())
        # Images of one score are named together.
        last = int(np.where(ranked[:-1] > ranked[1:], f1, -1).argmax())
        between = (ranked[last] + ranked[last + 1]) / 2
        thresholds[label] = between if between > ranked[last + 1] else ranked[last]
    return thresholds


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature of sigmoid that minimises log loss; logits and labels are `[N,C]`."""

    def derivatives(inverse: float) -> tuple[float, float]:
        probabilities = sigmoid(logits * np.float32(inverse))
        slope = float(((probabilities - labels) * logits).mean())
        return slope, float((probabilities * (1 - probabilities) * logits**2).mean())

    return minimise_over_temperature(derivatives)


def measure_label_reliability(scores: Floats, labels: Labels) -> Reliability:
    """Of all decisions in scores and labels `[N,C]`: how many have the label that is scored."""
    return measure_reliability(scores.ravel(), labels.ravel())


def _fit(logits: Floats, labels: Labels, basis: str, temperature: float) -> ThresholdCalibration:
    thresholds = best_thresholds(sigmoid(logits / np.float32(temperature)), labels)
    return ThresholdCalibration(temperature, thresholds, basis)


def _measure(logits: Floats, labels: Labels, calibration: ThresholdCalibration) -> ThresholdQuality:
    before = measure_label_reliability(sigmoid(logits), labels)
    after = measure_label_reliability(calibration.scores(logits), labels)
    return ThresholdQuality(before, after, calibration.answers(logits))
