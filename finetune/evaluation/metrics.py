"""How good a head is on images it did not train on: metrics from logits and labels, and how far chance may have moved them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finetune.evaluation.interval import NUM_RESAMPLES, Interval, draw_counts
from finetune.evaluation.label_metrics import LabelMetrics, evaluate_labels
from finetune.probe.solve import log_loss
from models.scores import Floats, Labels

# Counts drawn at once, so that a thousand classes do not fill the memory.
_MAX_DRAWN = 2_000_000


@dataclass(frozen=True)
class Metrics:
    """Of one split. `confusion` `[C,C]` counts images by true (row) and predicted (column) label; the others follow from it.

    A class without a prediction has precision 0, one without an image takes no part in the averages.
    """

    # The averages that have intervals, by attribute; the first is what runs and epochs are judged by.
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
        """The columns of a table of classes."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "F1": self.f1,
            "images": self.support,
        }

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of accuracy, balanced_accuracy and macro_f1 over the images; the same at every call."""
        return _bootstrap(self.confusion)

    def with_interval(self, name: str) -> str:
        """`0.9833 (0.969 to 0.994)` for one of the names of `intervals`."""
        return f"{getattr(self, name):.4f} ({self.intervals[name].low:.3f} to {self.intervals[name].high:.3f})"

    def most_confused(self, max_pairs: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: true label, predicted label, images."""
        mistakes = self.confusion - np.diag(np.diag(self.confusion))
        order = np.argsort(-mistakes, axis=None, kind="stable")[:max_pairs]
        pairs = (
            (int(true), int(predicted))
            for true, predicted in zip(*np.unravel_index(order, mistakes.shape), strict=True)
        )
        return [
            (true, predicted, int(mistakes[true, predicted]))
            for true, predicted in pairs
            if mistakes[true, predicted]
        ]

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


AnyMetrics = Metrics | LabelMetrics


def evaluate(
    logits: Floats, labels: Labels, answers: npt.NDArray[np.bool_] | None = None
) -> AnyMetrics:
    """Metrics of logits `[N,C]` against labels `[N]`; the loss is cross-entropy in nats of the logits as they are.

    Against labels `[N,C]` those of multi-label data, of the `answers` `[N,C]` or else of those with a score of at least a half.
    """
    if labels.ndim == 2:
        return evaluate_labels(logits, labels, logits >= 0 if answers is None else answers)
    num_classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    return Metrics(log_loss(logits, labels), confusion)


def tabulate(metrics: AnyMetrics, label_names: Sequence[str]) -> list[tuple[str, ...]]:
    """The head of a table of classes, then a row for each, as people read them."""
    columns = metrics.per_class
    rows = zip(label_names, *columns.values(), strict=True)
    head = ("label" if isinstance(metrics, LabelMetrics) else "class", *columns)
    return [
        head,
        *(
            (
                name,
                *(f"{number:.3f}" if number.dtype.kind == "f" else f"{number:,}" for number in row),
            )
            for name, *row in rows
        ),
    ]


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
        # As in Metrics, a class without an image takes no part in the averages.
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
