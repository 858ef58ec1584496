"""How good a head is on images it did not train on: metrics from logits and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.probe import Floats, Labels, log_loss


@dataclass(frozen=True)
class Metrics:
    """Of one split. `confusion` `[C,C]` counts images by true (row) and predicted (column) label; the others follow from it.

    A class without a prediction has precision 0, one without an image takes no part in the averages.
    """

    loss: float
    confusion: npt.NDArray[np.int64]

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
        return np.asarray(np.divide(2 * self.precision * self.recall, total, out=np.zeros_like(total), where=total > 0))

    def to_dict(self, label_names: tuple[str, ...]) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "loss": self.loss,
            "num_images": int(self.confusion.sum()),
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


def evaluate(logits: Floats, labels: Labels) -> Metrics:
    """Metrics of logits `[N,C]` against labels `[N]`; the loss is cross-entropy in nats of the logits as they are."""
    num_classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)
    return Metrics(log_loss(logits, labels), confusion)
