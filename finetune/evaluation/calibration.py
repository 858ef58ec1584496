"""Scores that mean what they say, and answers that say when they are unsure: temperature, and a conformal threshold.

The conformal set of an image holds every label whose score reaches the threshold. The threshold is chosen so that the sets of `coverage`
of all images like those it was fitted on hold the true label: split conformal prediction with the LAC score, one less the score of the
true label (Sadinle, Lei & Wasserman 2019, arXiv 1609.00451). An answer is unsure where the set is not exactly one label: none fits, or
several do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.strata import assign_folds
from finetune.probe.solve import NUM_FOLDS, Probe, fit_temperature
from models.scores import Floats, Labels, is_unsure, softmax
from models.sources import SplitName

NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """What logits are divided by before softmax, the score that puts a label in the conformal set at `coverage`, and what both were
    fitted on.
    """

    temperature: float
    coverage: float
    threshold: float
    basis: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "coverage": self.coverage,
            "threshold": self.threshold,
            "fitted_on": self.basis,
        }


@dataclass(frozen=True)
class Reliability:
    """Images by the score of their answer, in 15 bins of equal width: how many `[15]`, their mean score and share of right answers."""

    counts: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    accuracies: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): how far accuracy is from score, over all images."""
        return float(
            (self.counts * np.abs(self.accuracies - self.scores)).sum() / self.counts.sum()
        )


@dataclass(frozen=True)
class Calibrated:
    """What a calibration came to on images that it was not fitted on.

    `covered` is the share of images whose conformal set holds the true label, `unsure` of those marked unsure, and `sure_accuracy` of
    right answers among the others (NaN where there are none).
    """

    before: Reliability
    after: Reliability
    covered: float
    unsure: float
    sure_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "error_before_temperature": self.before.error,
            "error": self.after.error,
            "covered": self.covered,
            "unsure": self.unsure,
            "sure_accuracy": None if math.isnan(self.sure_accuracy) else self.sure_accuracy,
        }


def describe_calibration(calibration: Calibration, calibrated: Calibrated) -> str:
    """One line for people."""
    error = f"calibration error {calibrated.after.error:.3f} ({calibrated.before.error:.3f} before temperature)"
    asked = f"{100 * calibration.coverage:.4g}% coverage"
    if calibration.threshold == 0:
        return f"{error}; too few images to promise {asked}: every answer is unsure; a lower --coverage helps"
    sure = (
        ""
        if math.isnan(calibrated.sure_accuracy)
        else f", of the others {calibrated.sure_accuracy:.1%} right"
    )
    # Three standard errors: what images like the others do once in 700 times.
    slack = 3 * math.sqrt(
        calibration.coverage * (1 - calibration.coverage) / calibrated.after.counts.sum()
    )
    missed = (
        f"; only {calibrated.covered:.1%} are covered, so they differ from those it was fitted on"
    )
    is_missed = calibrated.covered < calibration.coverage - slack
    return f"{error}; {calibrated.unsure:.1%} unsure at {asked}{sure}{missed if is_missed else ''}"


def describe_unsure(calibration: Calibration) -> str:
    """What `unsure` means in the answers of a model, in two sentences for people."""
    return (
        f"An answer is unsure where not exactly one label has a score of at least {calibration.threshold:.3f}, after temperature "
        f"{calibration.temperature:.3f}, both fitted on {calibration.basis}. Of images like these, {100 * calibration.coverage:.4g}% have "
        "their true label among those that do; of images that belong to no class, nothing is promised."
    )


def calibrate_probe(
    probe: Probe,
    train_labels: Labels,
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    coverage: float,
) -> tuple[Calibration, dict[SplitName, Calibrated]]:
    """Fitted on the probe's out-of-fold predictions of its training images, and measured on every split of `logits`.

    The heads of the folds saw a fifth less than the published one, so it keeps what is asked for with a little to spare.
    """
    basis = f"out-of-fold predictions of {len(train_labels):,} training images"
    calibration = _fit(probe.out_of_fold_logits, train_labels, coverage, basis, probe.temperature)
    return calibration, {
        split: _measure(logits[split], labels[split], calibration) for split in logits
    }


def calibrate_trained(
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    coverage: float,
    seed: int,
) -> tuple[Calibration, dict[SplitName, Calibrated]]:
    """Fitted on "val", because a model that trained its layers has seen all of "train" and has no folds.

    On "val" it is measured by cross-validation, each fold with what the others gave, so as not to be fooled by its own fit; other splits
    take no part in it. That the epoch was chosen on the same images is not undone by this.
    """
    calibration = _fit(
        logits["val"],
        labels["val"],
        coverage,
        f"{len(labels['val']):,} validation images, which also chose the epoch",
    )
    calibrated: dict[SplitName, Calibrated] = {}
    for split in logits:
        calibrated[split] = _measure(logits[split], labels[split], calibration)
    folds = assign_folds(labels["val"], NUM_FOLDS, seed)
    temperatures, thresholds = np.ones((len(folds), 1), np.float32), np.zeros((len(folds), 1))
    for fold in range(int(folds.max()) + 1):
        others = folds != fold
        fitted = _fit(logits["val"][others], labels["val"][others], coverage, "")
        temperatures[~others], thresholds[~others] = fitted.temperature, fitted.threshold
    calibrated["val"] = _measure_scores(
        logits["val"], softmax(logits["val"] / temperatures), thresholds, labels["val"]
    )
    return calibration, calibrated


def _fit(
    logits: Floats, labels: Labels, coverage: float, basis: str, temperature: float | None = None
) -> Calibration:
    chosen = fit_temperature(logits, labels) if temperature is None else temperature
    return Calibration(
        chosen, coverage, conformal_threshold(softmax(logits / chosen), labels, coverage), basis
    )


def conformal_threshold(scores: Floats, labels: Labels, coverage: float) -> float:
    """The least score of a label in the conformal set: that of the true label which ⌈(N+1)·coverage⌉ of N images reach.

    0, so that every set holds every label, where N images are too few for `coverage`: it takes coverage / (1 - coverage) of them.
    """
    of_true = np.sort(scores[np.arange(len(labels)), labels])
    # Rounded first: 0.95 * 20 is a little more than 19 in floating point. What rounds to none is still more than none.
    num_covered = max(1, math.ceil(round((len(labels) + 1) * coverage, 9)))
    return 0.0 if num_covered > len(labels) else float(of_true[len(labels) - num_covered])


def measure_reliability(scores: Floats, labels: Labels) -> Reliability:
    """Of scores `[N,C]` against labels `[N]`."""
    best = scores.max(axis=1).astype(np.float64)
    is_right = scores.argmax(axis=1) == labels
    # Bins are closed above, as in the paper: (0, 1/15], …, (14/15, 1].
    bins = np.clip(np.ceil(best * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    sums = (np.bincount(bins, weights, NUM_BINS) for weights in (best, is_right))
    means = (np.asarray(each / counts.clip(min=1)) for each in sums)
    return Reliability(counts, *means)


def _measure(logits: Floats, labels: Labels, calibration: Calibration) -> Calibrated:
    """On logits `[N,C]` of images that `calibration` was not fitted on."""
    scores = softmax(logits / calibration.temperature)
    return _measure_scores(logits, scores, np.full((len(labels), 1), calibration.threshold), labels)


def _measure_scores(
    logits: Floats, scores: Floats, thresholds: npt.NDArray[np.float64], labels: Labels
) -> Calibrated:
    """Of scores `[N,C]` made of `logits`, with a threshold `[N,1]` for each image."""
    unsure = is_unsure(scores, thresholds)
    is_right = scores.argmax(axis=1) == labels
    return Calibrated(
        before=measure_reliability(softmax(logits), labels),
        after=measure_reliability(scores, labels),
        covered=float((scores[np.arange(len(labels)), labels] >= thresholds[:, 0]).mean()),
        unsure=float(unsure.mean()),
        sure_accuracy=math.nan if unsure.all() else float(is_right[~unsure].mean()),
    )
