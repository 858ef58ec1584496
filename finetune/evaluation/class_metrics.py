"""Metrics of one label per image, and how far chance may have moved them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finetune.evaluation.interval import NUM_RESAMPLES, Interval, draw_counts
from finetune.evaluation.metrics import Shares, format_with_interval
from models.scores import Floats, Labels

# Counts drawn at once, so that a thousand classes do not fill the memory.
_MAX_DRAWN = 2_000_000


@dataclass(frozen=True)
class ClassMetrics:
    """Of one split. `confusion` `[C,C]` counts images by true (row) and predicted (column) label.

    A class without a prediction has precision 0; one without an image takes no part in averages.
    """

    NAMES: ClassVar[dict[str, str]] = {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced accuracy",
        "macro_f1": "macro F1",
    }

    loss: float
    confusion: npt.NDArray[np.int64]

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def score(self) -> float:
        return self.accuracy

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def balanced_accuracy(self) -> float:
        return float(self.recall[self.support > 0].mean())

    @property
    def macro_f1(self) -> float:
        return float(self.f1[self.support > 0].mean())

    @property
    def support(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.confusion.sum(axis=1))

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        return np.asarray(np.diag(self.confusion) / np.maximum(self.confusion.sum(axis=0), 1))

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        return np.asarray(np.diag(self.confusion) / np.maximum(self.support, 1))

    @property
    def f1(self) -> npt.NDArray[np.float64]:
        total = self.precision + self.recall
        return np.asarray(
            np.divide(
                2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0
            )
        )

    @property
    def per_class(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "precision": self.precision,
            "recall": self.recall,
            "F1": self.f1,
            "images": self.support,
        }

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        return _bootstrap(self.confusion)

    @property
    def summary(self) -> str:
        return f"balanced {self.balanced_accuracy:.4f}, macro F1 {self.macro_f1:.4f}"

    def goal(self, *, is_balanced: bool) -> float:
        return self.balanced_accuracy if is_balanced else self.accuracy

    def with_interval(self, name: str) -> str:
        return format_with_interval(getattr(self, name), self.intervals[name])

    def to_dict(self, label_names: tuple[str, ...]) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "intervals": {name: interval.to_list() for name, interval in self.intervals.items()},
            "loss": self.loss,
            "num_images": self.num_images,
            "per_class": {
                name: {
                    "precision": float(self.precision[label]),
                    "recall": float(self.recall[label]),
                    "f1": float(self.f1[label]),
                    "support": int(self.support[label]),
                }
                for label, name in enumerate(label_names)
            },
        }


def evaluate_classes(logits: Floats, labels: Labels) -> ClassMetrics:
    """Of logits `[N,C]` against labels `[N]`."""
    num_classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    return ClassMetrics(class_log_loss(logits, labels), confusion)


def class_log_loss(logits: Floats, labels: Labels, class_weights: Floats | None = None) -> float:
    """Mean cross-entropy in nats of logits `[N,C]` against labels `[N]`.

    An image counts as much as `class_weights` `[C]` say of its class.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return float(
        losses.mean()
        if class_weights is None
        else np.average(losses, weights=class_weights[labels])
    )


def resample_accuracies(logits: Sequence[Floats], labels: Labels) -> Shares:
    """Accuracies of K heads, `[1+B,K]`: on all images, then on resampled ones, paired.

    `logits` are `[N,C]` of each head on the same images, with `labels` `[N]`.
    """
    is_right = np.stack([each.argmax(axis=1) == labels for each in logits])
    # The accuracies depend only on how many images are of each of the 2^K kinds of right and wrong.
    kinds = (1 << np.arange(len(is_right))) @ is_right
    counts = np.bincount(kinds, minlength=1 << len(is_right))
    is_right_of_kind = (np.arange(len(counts))[:, None] >> np.arange(len(is_right))) & 1
    drawn = np.concatenate([counts[None], draw_counts(counts)])
    return np.asarray(drawn @ is_right_of_kind / len(kinds))


def _bootstrap(confusion: npt.NDArray[np.int64]) -> dict[str, Interval]:
    true, predicted = np.nonzero(confusion)
    counts, num_classes = confusion[true, predicted], len(confusion)
    is_right = true == predicted
    parts: dict[str, list[npt.NDArray[np.float64]]] = {
        "accuracy": [],
        "balanced_accuracy": [],
        "macro_f1": [],
    }
    size = max(1, min(NUM_RESAMPLES, _MAX_DRAWN // max(len(counts), num_classes)))
    for start in range(0, NUM_RESAMPLES, size):
        draws = draw_counts(counts, min(size, NUM_RESAMPLES - start), seed=start)
        right = np.zeros((len(draws), num_classes))
        right[:, true[is_right]] = draws[:, is_right]
        support, answers = (_sum_by(draws, labels, num_classes) for labels in (true, predicted))
        # As in ClassMetrics, a class without an image takes no part in the averages.
        num_present = (support > 0).sum(axis=1)
        parts["accuracy"].append(right.sum(axis=1) / draws.sum(axis=1))
        parts["balanced_accuracy"].append((right / support.clip(min=1)).sum(axis=1) / num_present)
        f1 = np.where(support > 0, 2 * right / (support + answers).clip(min=1), 0)
        parts["macro_f1"].append(f1.sum(axis=1) / num_present)
    return {name: Interval.of(np.concatenate(values)) for name, values in parts.items()}


def _sum_by(
    draws: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.float64]:
    """Columns of draws `[B,K]` added up by their label `[K]`: `[B,C]`."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    sums = np.zeros((len(draws), num_classes))
    sums[:, present] = np.add.reduceat(draws[:, order], starts, axis=1)
    return sums
