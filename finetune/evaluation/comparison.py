"""Whether fine-tuning won more than chance over the probe, on the same validation images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finetune.evaluation.interval import Interval, draw_counts, draw_weights
from finetune.evaluation.label_metrics import (
    evaluate_labels,
    mean_of_present,
    measure_average_precision,
    num_resamples,
)
from models.scores import Floats, Labels


@dataclass(frozen=True)
class PairedScores:
    """Scores of two models on the same images, and the 95 % interval of second less first.

    `metric` is the attribute of Metrics that the scores are of.
    """

    metric: str
    first: float
    second: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """A fine-tuned model (second of `scores`) beside the probe (first), and their cost.

    The epoch was chosen on the same images, which flatters the fine-tuned model a little. The probe
    wins a tie, also because models of one frozen backbone are served together for the price of one.
    Without `has_learnt`, no epoch was better than the head that they began from: what is compared
    is that head on the original backbone.
    """

    scores: PairedScores
    probe_seconds: float
    train_seconds: float
    has_learnt: bool = True
    asked: Literal["auto", "probe", "tuned"] = "auto"

    @property
    def publishes(self) -> Literal["fine-tuned", "probe"]:
        if self.asked == "auto":
            return "fine-tuned" if self.scores.interval.low > 0 else "probe"
        return "probe" if self.asked == "probe" else "fine-tuned"

    def to_dict(self) -> dict[str, Any]:
        name = self.scores.metric.removeprefix("balanced_")
        return {
            "published": self.publishes,
            "by": self.scores.metric,
            f"probe_{name}": self.scores.first,
            f"fine_tuned_{name}": self.scores.second,
            "difference": self.scores.second - self.scores.first,
            "interval": self.scores.interval.to_list(),
            "probe_seconds": self.probe_seconds,
            "train_seconds": self.train_seconds,
        }

    def __str__(self) -> str:
        scores = self.scores
        difference = 100 * (scores.second - scores.first)
        low, high = 100 * scores.interval.low, 100 * scores.interval.high
        if low > 0:
            comparison, outcome = "fine-tuned is better", " and is published"
        elif high < 0:
            comparison, outcome = "the probe is better", " and is published"
        elif not self.has_learnt:
            comparison = "no epoch was better than the head that they began from"
            outcome = ", so the probe is published"
        else:
            comparison, outcome = "a tie", ", so the probe is published"
        if self.asked != "auto":
            outcome = f"; --publish {self.asked}: {self.publishes} is published"
        of_what = "" if scores.metric == "accuracy" else f" of {scores.metric.replace('_', ' ')}"
        return (
            f"fine-tuned {scores.second:.4f} in {self.train_seconds:.0f} s, probe "
            f"{scores.first:.4f} in {self.probe_seconds:.1f} s: {difference:+.1f} points{of_what} "
            f"(95%: {low:+.1f} to {high:+.1f}): {comparison}{outcome}"
        )


def compare_accuracies(
    first_logits: Floats,
    second_logits: Floats,
    labels: Labels,
    class_weights: Floats | None = None,
) -> PairedScores:
    """The paired bootstrap of accuracy, from logits `[N,C]` of the same images and labels `[N]`.

    With their own `class_weights` `[C]`, an image counts as much as its class is rare: accuracies
    are balanced.
    """
    weights = (
        np.ones(len(labels)) if class_weights is None else class_weights[labels].astype(np.float64)
    )
    first_right, second_right = (
        weights * (logits.argmax(axis=1) == labels) for logits in (first_logits, second_logits)
    )
    # The difference depends only on how many images add how much to it.
    gains, counts = np.unique(second_right - first_right, return_counts=True)
    differences = draw_counts(counts) @ gains / len(labels)
    return PairedScores(
        "accuracy" if class_weights is None else "balanced_accuracy",
        float(first_right.mean()),
        float(second_right.mean()),
        Interval.of(differences),
    )


def compare_average_precisions(
    first_logits: Floats, second_logits: Floats, labels: Labels
) -> PairedScores:
    """The paired bootstrap of mean average precision, from logits and labels `[N,C]`."""
    drawn = draw_weights(len(labels), num_resamples(labels))
    first, second = (
        mean_of_present(measure_average_precision(logits, labels, drawn))
        for logits in (first_logits, second_logits)
    )
    return PairedScores(
        "mean_average_precision",
        evaluate_labels(first_logits, labels).score,
        evaluate_labels(second_logits, labels).score,
        Interval.of(second - first),
    )
