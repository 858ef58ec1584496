"""Whether scores mean what they say: reliability, and what all calibrations have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.scores import Floats

NUM_BINS = 15

Bools = npt.NDArray[np.bool_]


class Calibration(Protocol):
    """How logits become scores and answers; fitted on images that the head did not train on."""

    @property
    def temperature(self) -> float: ...

    def scores(self, logits: Floats) -> Floats:
        """Logits `[N,C]` → probabilities `[N,C]`, after temperature."""

    def answers(self, logits: Floats) -> Bools:
        """Which labels the answer for each image names: logits `[N,C]` → `[N,C]`."""

    def describe_answers(self) -> str:
        """What the service's answers mean, in a sentence or two for people."""

    def to_checkpoint(self) -> dict[str, Any]:
        """What the service needs beside the temperature: a part of `graft` in config.json."""

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json holds it."""


class CalibrationQuality(Protocol):
    """Calibration error on held-out images."""

    @property
    def before(self) -> Reliability: ...

    @property
    def after(self) -> Reliability: ...

    @property
    def answers(self) -> Bools | None:
        """Which labels the answers name, `[N,C]`; None if each is the label of highest score."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Further columns of the report's table of calibration: name → this split's value."""

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """Further headline figures of the report: value, name, note."""

    def describe(self) -> str:
        """One line for people."""

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json holds it."""


@dataclass(frozen=True)
class Reliability:
    """Decisions by score, in 15 equal bins: how many, mean score, fraction right; `[15]` each."""

    counts: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    accuracies: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599)."""
        return float(
            (self.counts * np.abs(self.accuracies - self.scores)).sum() / self.counts.sum()
        )


def measure_reliability(scores: Floats, is_right: npt.NDArray[Any]) -> Reliability:
    """Of decisions with scores `[M]` and whether each is right `[M]`."""
    exact = scores.astype(np.float64)
    # Bins are closed above, as in the paper: (0, 1/15], …, (14/15, 1].
    bins = np.clip(np.ceil(exact * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    sums = (np.bincount(bins, weights, NUM_BINS) for weights in (exact, is_right))
    means = (np.asarray(each / counts.clip(min=1)) for each in sums)
    return Reliability(counts, *means)


def minimise_over_temperature(derivatives: Callable[[float], tuple[float, float]]) -> float:
    """The temperature of least log loss, by Newton's method on its inverse.

    `derivatives` gives the slope and the curvature of the loss at an inverse temperature.
    """
    inverse = 1.0
    for _ in range(50):
        slope, curvature = derivatives(inverse)
        step = slope / max(curvature, 1e-12)
        inverse = float(np.clip(inverse - np.clip(step, -inverse / 2, inverse), 0.05, 20.0))
        if abs(step) < 1e-5 * inverse:
            break
    return 1.0 / inverse


def describe_error(quality: CalibrationQuality) -> str:
    """The calibration error after and before temperature, for people."""
    after, before = quality.after.error, quality.before.error
    return f"calibration error {after:.3f} ({before:.3f} before temperature)"
