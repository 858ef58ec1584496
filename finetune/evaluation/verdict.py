"""Whether what gradient epochs won over the probe is more than chance, on the same validation images."""

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
class Verdict:
    """Validation accuracies of both (or what else `metric` names), the 95 % interval of their difference over the images, and their cost.

    The epoch was chosen on the same images, which flatters the fine-tuned model a little; the probe wins a tie, also because models of
    one frozen backbone are served together for the price of one. What was not `has_learnt`, for no epoch was better than the head that
    they began from, is that head on the backbone as it came. `asked` is `--publish`, which may overrule the comparison.
    """

    probe_accuracy: float
    tuned_accuracy: float
    interval: Interval
    probe_seconds: float
    train_seconds: float
    metric: str = "accuracy"
    has_learnt: bool = True
    asked: Literal["auto", "probe", "tuned"] = "auto"

    @property
    def publishes(self) -> Literal["fine-tuned", "probe"]:
        if self.asked == "auto":
            return "fine-tuned" if self.interval.low > 0 else "probe"
        return "probe" if self.asked == "probe" else "fine-tuned"

    def to_dict(self) -> dict[str, Any]:
        return {
            "published": self.publishes,
            "by": self.metric,
            f"probe_{self.metric.removeprefix('balanced_')}": self.probe_accuracy,
            f"fine_tuned_{self.metric.removeprefix('balanced_')}": self.tuned_accuracy,
            "difference": self.tuned_accuracy - self.probe_accuracy,
            "interval": self.interval.to_list(),
            "probe_seconds": self.probe_seconds,
            "train_seconds": self.train_seconds,
        }

    def __str__(self) -> str:
        difference = 100 * (self.tuned_accuracy - self.probe_accuracy)
        low, high = 100 * self.interval.low, 100 * self.interval.high
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
        of_what = "" if self.metric == "accuracy" else f" of {self.metric.replace('_', ' ')}"
        return (
            f"fine-tuned {self.tuned_accuracy:.4f} in {self.train_seconds:.0f} s, probe {self.probe_accuracy:.4f} in "
            f"{self.probe_seconds:.1f} s: {difference:+.1f} points{of_what} "
            f"(95%: {low:+.1f} to {high:+.1f}): {comparison}{outcome}"
        )


def compare_with_probe(
    probe_logits: Floats,
    tuned_logits: Floats,
    labels: Labels,
    *,
    class_weights: Floats | None = None,
    probe_seconds: float,
    train_seconds: float,
    has_learnt: bool = True,
) -> Verdict:
    """The paired bootstrap of logits `[N,C]` of the same N validation images; with labels `[N,C]`, of the mean average precision.

    With their own `class_weights` `[C]`, an image counts as much as its class is rare: accuracies are balanced.
    """
    if labels.ndim == 2:
        drawn = draw_weights(len(labels), num_resamples(labels))
        means = [
            mean_of_present(measure_average_precision(logits, labels, drawn))
            for logits in (probe_logits, tuned_logits)
        ]
        scores = [
            evaluate_labels(logits, labels, logits >= 0).score
            for logits in (probe_logits, tuned_logits)
        ]
        interval = Interval.of(means[1] - means[0])
        return Verdict(
            scores[0],
            scores[1],
            interval,
            probe_seconds,
            train_seconds,
            "mean_average_precision",
            has_learnt,
        )
    weights = (
        np.ones(len(labels)) if class_weights is None else class_weights[labels].astype(np.float64)
    )
    probe_right, tuned_right = (
        weights * (logits.argmax(axis=1) == labels) for logits in (probe_logits, tuned_logits)
    )
    # All that the difference depends on is how many images give how much to it.
    gains, counts = np.unique(tuned_right - probe_right, return_counts=True)
    differences = draw_counts(counts) @ gains / len(labels)
    accuracies = float(probe_right.mean()), float(tuned_right.mean())
    metric = "accuracy" if class_weights is None else "balanced_accuracy"
    return Verdict(
        *accuracies, Interval.of(differences), probe_seconds, train_seconds, metric, has_learnt
    )
