"""Whether what gradient epochs won over the probe is more than chance, on the same validation images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.evaluate import Interval, draw_counts
from finetune.probe import Floats, Labels


@dataclass(frozen=True)
class Verdict:
    """Validation accuracies of both (`is_balanced`: the means of their classes' recalls), the 95 % interval of their difference over the
    images, and what each cost.

    The epoch was chosen on the same images, which flatters the fine-tuned model a little; the probe wins a tie, also because models of
    one frozen backbone are served together for the price of one.
    """

    probe_accuracy: float
    tuned_accuracy: float
    interval: Interval
    probe_seconds: float
    train_seconds: float
    is_balanced: bool = False

    @property
    def publishes(self) -> str:
        return "fine-tuned" if self.interval.low > 0 else "probe"

    def to_dict(self) -> dict[str, Any]:
        return {
            "published": self.publishes,
            "by": "balanced_accuracy" if self.is_balanced else "accuracy",
            "probe_accuracy": self.probe_accuracy,
            "fine_tuned_accuracy": self.tuned_accuracy,
            "difference": self.tuned_accuracy - self.probe_accuracy,
            "interval": self.interval.to_list(),
            "probe_seconds": self.probe_seconds,
            "train_seconds": self.train_seconds,
        }

    def __str__(self) -> str:
        difference = 100 * (self.tuned_accuracy - self.probe_accuracy)
        low, high = 100 * self.interval.low, 100 * self.interval.high
        if low > 0:
            outcome = "fine-tuned is better and is published"
        elif high < 0:
            outcome = "the probe is better and is published"
        else:
            outcome = "a tie, so the probe is published"
        return (
            f"fine-tuned {self.tuned_accuracy:.4f} in {self.train_seconds:.0f} s, probe {self.probe_accuracy:.4f} in "
            f"{self.probe_seconds:.1f} s: {difference:+.1f} points{' of balanced accuracy' if self.is_balanced else ''} "
            f"(95%: {low:+.1f} to {high:+.1f}): {outcome}"
        )


def compare_with_probe(
    probe_logits: Floats,
    tuned_logits: Floats,
    labels: Labels,
    *,
    class_weights: Floats | None = None,
    probe_seconds: float,
    train_seconds: float,
) -> Verdict:
    """The paired bootstrap of logits `[N,C]` of the same N validation images.

    With their own `class_weights` `[C]`, an image counts as much as its class is rare: accuracies are balanced.
    """
    weights = np.ones(len(labels)) if class_weights is None else class_weights[labels].astype(np.float64)
    probe_right, tuned_right = (weights * (logits.argmax(axis=1) == labels) for logits in (probe_logits, tuned_logits))
    # All that the difference depends on is how many images give how much to it.
    gains, counts = np.unique(tuned_right - probe_right, return_counts=True)
    differences = draw_counts(counts) @ gains / len(labels)
    accuracies = float(probe_right.mean()), float(tuned_right.mean())
    return Verdict(*accuracies, Interval.of(differences), probe_seconds, train_seconds, class_weights is not None)
