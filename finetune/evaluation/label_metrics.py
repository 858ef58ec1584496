"""Metrics of any number of labels per image: ranking by score, and the labels that answers name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finetune.evaluation.interval import NUM_RESAMPLES, Interval, draw_weights
from finetune.evaluation.metrics import Shares, format_with_interval
from models.scores import Floats, Labels

# Images times labels times resamples: 2,000 resamples of 2,000 images with 20 labels take a second.
_MAX_WORK = 80_000_000
_MIN_RESAMPLES = 200


@dataclass(frozen=True)
class LabelMetrics:
    """Of one split: `logits` and `labels` `[N,C]`, and which labels the `answers` `[N,C]` name.

    Macro averages are over the labels that some image has. A label without answers has precision 0.
    """

    NAMES: ClassVar[dict[str, str]] = {
        "mean_average_precision": "mean average precision",
        "macro_f1": "macro F1",
        "micro_f1": "micro F1",
        "exact_match": "exact match",
        "hamming_loss": "hamming loss",
    }

    loss: float
    logits: Floats
    labels: Labels
    answers: npt.NDArray[np.bool_]
    confusion: None = None

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def score(self) -> float:
        return self.mean_average_precision

    @property
    def mean_average_precision(self) -> float:
        return float(self.average_precision[self.support > 0].mean())

    @property
    def macro_f1(self) -> float:
        return float(self.f1[self.support > 0].mean())

    @property
    def micro_f1(self) -> float:
        return float(
            2 * self._num_right.sum() / max(1, self.support.sum() + self._num_answered.sum())
        )

    @property
    def exact_match(self) -> float:
        """The fraction of images whose answer names all their labels and no other."""
        return float((self.answers == self.labels).all(axis=1).mean())

    @property
    def hamming_loss(self) -> float:
        """The fraction of wrong decisions, an image and a label each."""
        return float((self.answers != self.labels).mean())

    @property
    def support(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.labels.sum(axis=0))

    @cached_property
    def average_precision(self) -> Shares:
        """Of each label `[C]`, NaN where no image has it."""
        return np.asarray(
            measure_average_precision(
                self.logits, self.labels, np.ones((1, len(self.labels)), np.float32)
            )[0]
        )

    @property
    def precision(self) -> Shares:
        return np.asarray(self._num_right / self._num_answered.clip(min=1))

    @property
    def recall(self) -> Shares:
        return np.asarray(self._num_right / self.support.clip(min=1))

    @property
    def f1(self) -> Shares:
        return np.asarray(2 * self._num_right / (self.support + self._num_answered).clip(min=1))

    @property
    def per_class(self) -> dict[str, npt.NDArray[Any]]:
        ranked = {
            "precision": self.precision,
            "recall": self.recall,
            "F1": self.f1,
            "average precision": self.average_precision,
        }
        return {**ranked, "images": self.support}

    @property
    def _num_right(self) -> npt.NDArray[np.int64]:
        return np.asarray((self.answers & (self.labels == 1)).sum(axis=0))

    @property
    def _num_answered(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.answers.sum(axis=0))

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        weights = draw_weights(len(self.labels), num_resamples(self.labels))
        right, answered, has = (
            (weights @ part.astype(np.float32)).astype(np.float64)
            for part in (self.answers & (self.labels == 1), self.answers, self.labels == 1)
        )
        f1 = np.where(has > 0, 2 * right / (has + answered).clip(min=1), np.nan)
        is_wrong = self.answers != self.labels
        resampled = {
            "mean_average_precision": mean_of_present(
                measure_average_precision(self.logits, self.labels, weights)
            ),
            "macro_f1": mean_of_present(f1),
            "micro_f1": 2
            * right.sum(axis=1)
            / (has.sum(axis=1) + answered.sum(axis=1)).clip(min=1),
            "exact_match": (weights @ (~is_wrong.any(axis=1)).astype(np.float32)).astype(np.float64)
            / len(self.labels),
            "hamming_loss": (weights @ is_wrong.sum(axis=1).astype(np.float32)).astype(np.float64)
            / is_wrong.size,
        }
        return {name: Interval.of(resampled[name]) for name in self.NAMES}

    @property
    def summary(self) -> str:
        return f"macro F1 {self.macro_f1:.4f}, exact match {self.exact_match:.4f}"

    def goal(self, *, is_balanced: bool) -> float:
        return self.mean_average_precision

    def with_interval(self, name: str) -> str:
        return format_with_interval(getattr(self, name), self.intervals[name])

    def to_dict(self, label_names: tuple[str, ...]) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self.NAMES},
            "intervals": {name: interval.to_list() for name, interval in self.intervals.items()},
            "loss": self.loss,
            "num_images": self.num_images,
            "per_class": {
                name: {
                    "precision": float(self.precision[label]),
                    "recall": float(self.recall[label]),
                    "f1": float(self.f1[label]),
                    "average_precision": float(self.average_precision[label])
                    if self.support[label]
                    else None,
                    "support": int(self.support[label]),
                }
                for label, name in enumerate(label_names)
            },
        }


def evaluate_labels(
    logits: Floats, labels: Labels, answers: npt.NDArray[np.bool_] | None = None
) -> LabelMetrics:
    """Of logits and labels `[N,C]`, with `answers` `[N,C]` or else all scores from a half."""
    named = logits >= 0 if answers is None else answers
    return LabelMetrics(label_log_loss(logits, labels), logits, labels, named)


def label_log_loss(logits: Floats, labels: Labels) -> float:
    """Mean cross-entropy in nats of all decisions, from logits and labels `[N,C]`."""
    return float((np.logaddexp(0, logits) - labels * logits).mean())


def resample_average_precisions(logits: Sequence[Floats], labels: Labels) -> Shares:
    """Mean average precisions of K heads, `[≤1+B,K]`: on all images, then resampled, paired.

    `logits` are `[N,C]` of each head on the same images, with `labels` `[N,C]`.
    """
    weights = draw_weights(len(labels), num_resamples(labels))
    weights[0] = 1  # the images as they are
    precisions = [measure_average_precision(each, labels, weights) for each in logits]
    return np.stack([mean_of_present(each) for each in precisions], axis=1)


def num_resamples(labels: Labels) -> int:
    """How often images with labels `[N,C]` are resampled: less often if they are many."""
    return int(np.clip(_MAX_WORK / labels.size, _MIN_RESAMPLES, NUM_RESAMPLES))


def mean_of_present(values: Shares) -> Shares:
    """The mean of what is not NaN in each row of `[B,C]`, without rows that are all NaN: `[≤B]`."""
    present = ~np.isnan(values)
    counts = present.sum(axis=1)
    return np.asarray(np.where(present, values, 0).sum(axis=1)[counts > 0] / counts[counts > 0])


def measure_average_precision(logits: Floats, labels: Labels, weights: Floats) -> Shares:
    """The average precision of each label, `[B,C]`: image n counts `weights[b,n]` times in row b.

    The mean over a label's images of the precision among all that score as high or higher
    (Manning, Raghavan & Schütze 2008, 8.4); NaN for a label without images. `logits` are `[N,C]`.
    """
    found = np.full((len(weights), labels.shape[1]), np.nan)
    for label in np.flatnonzero(labels.any(axis=0)):
        found[:, label] = _average_precision(logits[:, label], labels[:, label] == 1, weights)
    return found


def _average_precision(logits: Floats, has_label: npt.NDArray[np.bool_], weights: Floats) -> Shares:
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    # Images of one score are one step: neither comes before the other.
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    of_label = np.flatnonzero(has_label[order])
    steps, starts = np.unique(np.searchsorted(ends, of_label), return_index=True)
    ends = ends[steps]
    right = np.add.reduceat(weights[:, order[of_label]], starts, axis=1).astype(np.float64)
    listed = np.add.reduceat(
        weights[:, order[: ends[-1] + 1]], np.concatenate([[0], ends[:-1] + 1]), axis=1
    ).cumsum(axis=1)
    precision = right.cumsum(axis=1) / listed.clip(min=1)
    total = right.sum(axis=1)
    return np.asarray(
        np.divide(
            (right * precision).sum(axis=1),
            total,
            out=np.full(len(weights), np.nan),
            where=total > 0,
        )
    )
