"""Calibration of one label per image: a temperature, and which answers are unsure.

The conformal set of an image holds every label whose score reaches the threshold. The threshold is
chosen so that the sets of `coverage` of all images hold the true label: split conformal prediction
with the LAC score, one less the score of the true label (Sadinle, Lei & Wasserman 2019, arXiv
1609.00451). An answer is unsure where the set does not hold exactly one label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from models.scores import Floats, Labels, is_unsure, softmax
from models.sources import SplitName


@dataclass(frozen=True)
class ConformalCalibration:
    """The temperature before softmax, and the least score of a label in the conformal set.

    `basis` names the images that both were fitted on.
    """

    temperature: float
    coverage: float
    threshold: float
    basis: str

    def scores(self, logits: Floats) -> Floats:
        """Logits `[N,C]` → probabilities `[N,C]`, after temperature."""
        return softmax(logits / self.temperature)

    def answers(self, logits: Floats) -> Bools:
        """The label of highest score, `[N,C]` with one True a row."""
        return np.asarray(np.arange(logits.shape[1]) == logits.argmax(axis=1)[:, None])

    def describe_answers(self) -> str:
        """What `unsure` means in the service's answers."""
        return (
            "An answer is unsure where not exactly one label has a score of at least "
            f"{self.threshold:.3f}, after temperature {self.temperature:.3f}, both fitted on "
            f"{self.basis}. Of images like these, {100 * self.coverage:.4g}% have their true label "
            "among those that do; of images that belong to no class, nothing is promised."
        )

    def to_checkpoint(self) -> dict[str, Any]:
        return {"conformal": {"coverage": self.coverage, "threshold": self.threshold}}

    def to_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "coverage": self.coverage,
            "threshold": self.threshold,
            "fitted_on": self.basis,
        }


@dataclass(frozen=True)
class ConformalQuality:
    """Calibration error and conformal coverage on held-out images.

    `covered` is the fraction of images whose conformal set holds the true label, `unsure` of those
    marked unsure, and `sure_accuracy` of right answers among the others (NaN if there are none).
    """

    calibration: ConformalCalibration
    before: Reliability
    after: Reliability
    covered: float
    unsure: float
    sure_accuracy: float
    answers: None = None

    @property
    def columns(self) -> Mapping[str, str]:
        is_none_sure = math.isnan(self.sure_accuracy)
        return {
            "covered": f"{self.covered:.1%}",
            "unsure": f"{self.unsure:.1%}",
            "right where sure": "none" if is_none_sure else f"{self.sure_accuracy:.1%}",
        }

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        coverage = f"at {100 * self.calibration.coverage:.4g}% coverage"
        return [(f"{self.unsure:.1%}", "unsure answers", coverage)]

    def describe(self) -> str:
        """One line for people."""
        error, coverage = describe_error(self), self.calibration.coverage
        asked = f"{100 * coverage:.4g}% coverage"
        if self.calibration.threshold == 0:
            return (
                f"{error}; too few images to promise {asked}: every answer is unsure; "
                "a lower --coverage helps"
            )
        is_none_sure = math.isnan(self.sure_accuracy)
        sure = "" if is_none_sure else f", of the others {self.sure_accuracy:.1%} right"
        # Three standard errors: what images like the others do once in 700 times.
        slack = 3 * math.sqrt(coverage * (1 - coverage) / self.after.counts.sum())
        missed = (
            f"; only {self.covered:.1%} are covered, so they differ from those it was fitted on"
            if self.covered < coverage - slack
            else ""
        )
        return f"{error}; {self.unsure:.1%} unsure at {asked}{sure}{missed}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "error_before_temperature": self.before.error,
            "error": self.after.error,
            "covered": self.covered,
            "unsure": self.unsure,
            "sure_accuracy": None if math.isnan(self.sure_accuracy) else self.sure_accuracy,
        }


def calibrate_probe(
    out_of_fold_logits: Floats,
    temperature: float,
    train_labels: Labels,
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    coverage: float,
) -> tuple[ConformalCalibration, dict[SplitName, ConformalQuality]]:
    """Fit on a probe's out-of-fold logits `[N,C]`, and measure on every split of `logits`.

    The heads of the folds saw a fifth less than the published one, so coverage is a little higher
    than asked for.
    """
    basis = f"out-of-fold predictions of {len(train_labels):,} training images"
    calibration = _fit(out_of_fold_logits, train_labels, coverage, basis, temperature)
    return calibration, {
        split: _measure(logits[split], labels[split], calibration) for split in logits
    }


def calibrate_trained(
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    coverage: float,
    folds: npt.NDArray[np.int64],
) -> tuple[ConformalCalibration, dict[SplitName, ConformalQuality]]:
    """Fit on "val": a model that trained its layers has seen all of "train" and has no folds.

    "val" itself is measured by cross-validation over `folds` `[N]`, each with what the others
    gave; other splits take no part in the fit. That the epoch was chosen on the same images is not
    undone by this.
    """
    val_logits, val_labels = logits["val"], labels["val"]
    basis = f"{len(val_labels):,} validation images, which also chose the epoch"
    calibration = _fit(
        val_logits, val_labels, coverage, basis, fit_temperature(val_logits, val_labels)
    )
    quality = {split: _measure(logits[split], labels[split], calibration) for split in logits}
    temperatures, thresholds = np.ones((len(folds), 1), np.float32), np.zeros((len(folds), 1))
    for fold in range(int(folds.max()) + 1):
        others = folds != fold
        other_logits, other_labels = val_logits[others], val_labels[others]
        temperature = fit_temperature(other_logits, other_labels)
        fitted = _fit(other_logits, other_labels, coverage, "", temperature)
        temperatures[~others], thresholds[~others] = fitted.temperature, fitted.threshold
    scores = softmax(val_logits / temperatures)
    quality["val"] = _measure_scores(val_logits, scores, thresholds, val_labels, calibration)
    return calibration, quality


def conformal_threshold(scores: Floats, labels: Labels, coverage: float) -> float:
    """The least score of a label in the conformal set, from scores `[N,C]` and labels `[N]`.

    It is the score that the true labels of ⌈(N+1)·coverage⌉ of N images reach. 0, so that every set
    holds every label, if N is less than coverage / (1 - coverage).
    """
    of_true = np.sort(scores[np.arange(len(labels)), labels])
    # Rounded first: 0.95 * 20 is a little more than 19 in floating point. One image at least.
    num_covered = max(1, math.ceil(round((len(labels) + 1) * coverage, 9)))
    return 0.0 if num_covered > len(labels) else float(of_true[len(labels) - num_covered])


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature of softmax that minimises log loss (Guo et al. 2017, arXiv 1706.04599).

    Newton's method on its inverse, in which the loss is convex. Logits are `[N,C]`, labels `[N]`.
    """
    rows = np.arange(len(labels))

    def derivatives(inverse: float) -> tuple[float, float]:
        probabilities = softmax(logits * inverse)
        expected = (probabilities * logits).sum(axis=1)
        slope = float((expected - logits[rows, labels]).mean())
        return slope, float(((probabilities * logits**2).sum(axis=1) - expected**2).mean())

    return minimise_over_temperature(derivatives)


def measure_class_reliability(scores: Floats, labels: Labels) -> Reliability:
    """Of the answers to images, from scores `[N,C]` and labels `[N]`."""
    return measure_reliability(scores.max(axis=1), scores.argmax(axis=1) == labels)


def _fit(
    logits: Floats, labels: Labels, coverage: float, basis: str, temperature: float
) -> ConformalCalibration:
    threshold = conformal_threshold(softmax(logits / temperature), labels, coverage)
    return ConformalCalibration(temperature, coverage, threshold, basis)


def _measure(logits: Floats, labels: Labels, calibration: ConformalCalibration) -> ConformalQuality:
    thresholds = np.full((len(labels), 1), calibration.threshold)
    return _measure_scores(logits, calibration.scores(logits), thresholds, labels, calibration)


def _measure_scores(
    logits: Floats,
    scores: Floats,
    thresholds: npt.NDArray[np.float64],
    labels: Labels,
    calibration: ConformalCalibration,
) -> ConformalQuality:
    """Of scores `[N,C]` made of `logits`, with a threshold `[N,1]` for each image."""
    unsure = is_unsure(scores, thresholds)
    is_right = scores.argmax(axis=1) == labels
    return ConformalQuality(
        calibration=calibration,
        before=measure_class_reliability(softmax(logits), labels),
        after=measure_class_reliability(scores, labels),
        covered=float((scores[np.arange(len(labels)), labels] >= thresholds[:, 0]).mean()),
        unsure=float(unsure.mean()),
        sure_accuracy=math.nan if unsure.all() else float(is_right[~unsure].mean()),
    )
