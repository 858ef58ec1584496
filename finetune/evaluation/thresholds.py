"""Multi-label scores that mean what they say, and for each label the score from which on an answer names it.

There is no conformal threshold here, and no `unsure`: an image of no label is an answer like any other, and a promise that holds for whole
sets of labels at once would need other sets than one score gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.strata import assign_folds
from finetune.evaluation.calibration import NUM_BINS, Reliability
from finetune.probe.solve import NUM_FOLDS, Probe, fit_temperature
from models.scores import Floats, Labels, sigmoid
from models.sources import SplitName


@dataclass(frozen=True)
class LabelCalibration:
    """What logits are divided by before sigmoid, the least score `[C]` at which an answer names a label, and what both were fitted on."""

    temperature: float
    thresholds: Floats
    basis: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "thresholds": self.thresholds.tolist(),
            "fitted_on": self.basis,
        }


@dataclass(frozen=True)
class LabelCalibrated:
    """What a calibration came to on images that it was not fitted on: of all decisions, and the labels `[N,C]` that answers name."""

    before: Reliability
    after: Reliability
    answers: npt.NDArray[np.bool_]

    def to_dict(self) -> dict[str, Any]:
        return {"error_before_temperature": self.before.error, "error": self.after.error}


def describe_label_calibration(calibrated: LabelCalibrated) -> str:
    """One line for people."""
    return f"calibration error {calibrated.after.error:.3f} ({calibrated.before.error:.3f} before temperature)"


def describe_thresholds(calibration: LabelCalibration) -> str:
    """What an answer names, in a sentence for people."""
    low, high = calibration.thresholds.min(), calibration.thresholds.max()
    return (
        f"An answer names the labels whose score, after temperature {calibration.temperature:.3f}, reaches a threshold of their own "
        f"({low:.3f} to {high:.3f}): the one of best F1 on {calibration.basis}."
    )


def calibrate_probe_of_labels(
    probe: Probe,
    train_labels: Labels,
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
) -> tuple[LabelCalibration, dict[SplitName, LabelCalibrated]]:
    """Fitted on the probe's out-of-fold predictions of its training images, and measured on every split of `logits`."""
    thresholds = best_thresholds(
        sigmoid(probe.out_of_fold_logits / np.float32(probe.temperature)), train_labels
    )
    basis = f"out-of-fold predictions of {len(train_labels):,} training images"
    calibration = LabelCalibration(probe.temperature, thresholds, basis)
    return calibration, {
        split: _measure(logits[split], labels[split], calibration) for split in logits
    }


def calibrate_trained_of_labels(
    logits: Mapping[SplitName, Floats], labels: Mapping[SplitName, Labels], seed: int
) -> tuple[LabelCalibration, dict[SplitName, LabelCalibrated]]:
    """Fitted on "val", where it is measured by cross-validation, for the reasons that `calibrate_trained` has."""
    calibration = _fit(
        logits["val"],
        labels["val"],
        f"{len(labels['val']):,} validation images, which also chose the epoch",
    )
    calibrated = {split: _measure(logits[split], labels[split], calibration) for split in logits}
    folds = assign_folds(labels["val"], NUM_FOLDS, seed)
    scores, answers = np.empty_like(logits["val"]), np.empty(logits["val"].shape, bool)
    for fold in range(int(folds.max()) + 1):
        others = folds != fold
        fitted = _fit(logits["val"][others], labels["val"][others], "")
        scores[~others] = sigmoid(logits["val"][~others] / np.float32(fitted.temperature))
        answers[~others] = scores[~others] >= fitted.thresholds
    before = measure_label_reliability(sigmoid(logits["val"]), labels["val"])
    calibrated["val"] = LabelCalibrated(
        before, measure_label_reliability(scores, labels["val"]), answers
    )
    return calibration, calibrated


def best_thresholds(scores: Floats, labels: Labels) -> Floats:
    """For each label of scores and labels `[N,C]` the threshold of best F1, halfway to the next lower score; 0.5 where no image has it."""
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


def measure_label_reliability(scores: Floats, labels: Labels) -> Reliability:
    """Of all decisions in scores and labels `[N,C]`: in each bin, how many have the label that is scored."""
    flat = scores.astype(np.float64).ravel()
    bins = np.clip(np.ceil(flat * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    sums = (np.bincount(bins, weights, NUM_BINS) for weights in (flat, labels.ravel()))
    means = (np.asarray(each / counts.clip(min=1)) for each in sums)
    return Reliability(counts, *means)


def _fit(logits: Floats, labels: Labels, basis: str) -> LabelCalibration:
    temperature = fit_temperature(logits, labels)
    return LabelCalibration(
        temperature, best_thresholds(sigmoid(logits / np.float32(temperature)), labels), basis
    )


def _measure(logits: Floats, labels: Labels, calibration: LabelCalibration) -> LabelCalibrated:
    """On logits `[N,C]` of images that `calibration` was not fitted on."""
    scores = sigmoid(logits / np.float32(calibration.temperature))
    before, after = (measure_label_reliability(each, labels) for each in (sigmoid(logits), scores))
    return LabelCalibrated(before, after, scores >= calibration.thresholds)
