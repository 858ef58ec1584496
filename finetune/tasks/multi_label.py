"""Any number of labels per image: sigmoids, mean average precision, thresholds of best F1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation import thresholds
from finetune.evaluation.calibration import Bools, Calibration, CalibrationQuality
from finetune.evaluation.comparison import PairedScores, compare_average_precisions
from finetune.evaluation.label_metrics import (
    LabelMetrics,
    evaluate_labels,
    label_log_loss,
    resample_average_precisions,
)
from finetune.evaluation.metrics import Shares
from finetune.tasks.strata import NUM_FOLDS, restratify_val, stratify_folds, stratify_val
from finetune.tasks.task import Correction, Label, Task, Words, WrongAnswer
from models.errors import GraftError
from models.scores import Floats, Labels, sigmoid
from models.sources import SEPARATOR, SplitName

if TYPE_CHECKING:
    import torch


class MultiLabel:
    """See Task. Labels are `int64 [N,C]` of 0 and 1."""

    name = "multi-label"
    label_column = "labels"
    metric = "mean_average_precision"
    metric_name = "mean average precision"
    min_labels = 1
    unsupported_options: tuple[str, ...] = ("balance", "mix", "label_smoothing")
    words = Words(
        label="label",
        labels="labels",
        labels_of_images="labels (any number an image)",
        classifier="A multi-label image classifier",
        decisions="decisions",
        right="have the label",
        fraction_right="share that has the label",
    )

    def number(self, named: str | tuple[str, ...], numbers: Mapping[str, int]) -> Label:
        return tuple(numbers[name] for name in named)

    def restore(self, stored: Any) -> Label:
        return tuple(map(int, stored))

    def encode(self, labels: Sequence[Label], num_labels: int) -> Labels:
        rows = np.zeros((len(labels), num_labels), np.int64)
        for row, label in zip(rows, labels, strict=True):
            row[list(_places(label))] = 1
        return rows

    def describe(self, label: Label, label_names: Sequence[str]) -> str:
        return _join(_places(label), label_names)

    def count(self, labels: Labels, num_labels: int) -> npt.NDArray[np.int64]:
        return np.asarray(labels.sum(axis=0))

    def check_label_names(self, label_names: Sequence[str], data: str) -> None:
        if len(label_names) < self.min_labels:
            raise GraftError(
                f"--data {data}: no image has a label; the column labels takes names with "
                f"{SEPARATOR} between them"
            )

    def find_unlearnable(self, labels: Labels, label_names: Sequence[str]) -> str | None:
        for name, has_label in zip(label_names, labels.T, strict=True):
            if has_label.size and has_label.all():
                return (
                    f"every image to train on has the label {name!r}, so that it cannot be "
                    "learnt; take it out"
                )
        return None

    def assign_folds(self, labels: Labels, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
        return stratify_folds(labels, min(num_folds, len(labels)), seed)

    def split_off_val(
        self,
        labels: Labels,
        num_labels: int,
        val_fraction: float,
        seed: int,
        placed: npt.NDArray[np.int64],
    ) -> Bools:
        return np.asarray(stratify_val(labels, val_fraction, seed, placed) == 1)

    def refill_val(
        self, labels: Labels, was_val: Bools, is_val: Bools, can_move: Bools, seed: int
    ) -> Bools:
        return restratify_val(labels, was_val, is_val, can_move, seed)

    def draw_order(self, labels: Labels, seed: int) -> npt.NDArray[np.int64]:
        """By chance alone: of a hundred images and more, any first part is near enough."""
        return np.random.default_rng(seed).permutation(len(labels))

    def nested_ranks(self, labels: Labels, num_parts: int, seed: int) -> Shares:
        return np.asarray(stratify_folds(labels, num_parts, seed) / num_parts)

    def class_weights(self, labels: Labels, num_labels: int) -> Floats:
        """All 1: labels are not weighed."""
        return np.ones(num_labels, np.float32)

    def warn_if_imbalanced(self, labels: Labels, label_names: tuple[str, ...]) -> None:
        """There is no --balance to name: each label is a classification of its own."""

    def scores(self, logits: Floats) -> Floats:
        return sigmoid(logits)

    def is_right(self, logits: Floats, labels: Labels) -> Bools:
        return np.asarray(((logits >= 0) == labels).all(axis=1))

    def log_loss(
        self, logits: Floats, labels: Labels, class_weights: Floats | None = None
    ) -> float:
        return label_log_loss(logits, labels)

    def loss_and_gradient(self, logits: Floats, labels: Labels, shares: Floats) -> Floats:
        """Summed over the labels, so that each is a regression of its own."""
        targets = labels[:, None, :].astype(np.float32)
        entropies = np.logaddexp(np.float32(0), logits) - targets * logits
        losses: Floats = (entropies.sum(axis=2) * shares.T).sum(axis=0)
        logits[:] = (sigmoid(logits) - targets) * shares.T[:, :, None]
        return losses

    def fit_temperature(self, logits: Floats, labels: Labels) -> float:
        return thresholds.fit_temperature(logits, labels)

    def training_targets(self, labels: Labels) -> list[Any]:
        """Each image's row, `float32 [C]`."""
        return list(labels.astype(np.float32))

    def losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        class_weights: torch.Tensor | None,
        label_smoothing: float,
    ) -> torch.Tensor:
        """The mean cross-entropy of an image's labels, `[B]`; targets are `float [B,C]`."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)

    def evaluate(
        self, logits: Floats, labels: Labels, answers: Bools | None = None
    ) -> LabelMetrics:
        return evaluate_labels(logits, labels, answers)

    def calibrate_probe(
        self,
        out_of_fold_logits: Floats,
        temperature: float,
        train_labels: Labels,
        logits: Mapping[SplitName, Floats],
        labels: Mapping[SplitName, Labels],
        coverage: float,
    ) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
        return thresholds.calibrate_probe(
            out_of_fold_logits, temperature, train_labels, logits, labels
        )

    def calibrate_trained(
        self,
        logits: Mapping[SplitName, Floats],
        labels: Mapping[SplitName, Labels],
        coverage: float,
        seed: int,
    ) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
        folds = self.assign_folds(labels["val"], NUM_FOLDS, seed)
        return thresholds.calibrate_trained(logits, labels, folds)

    def compare(
        self,
        first_logits: Floats,
        second_logits: Floats,
        labels: Labels,
        class_weights: Floats | None = None,
    ) -> PairedScores:
        return compare_average_precisions(first_logits, second_logits, labels)

    def resampled_scores(self, logits: Sequence[Floats], labels: Labels) -> Shares:
        return resample_average_precisions(logits, labels)

    def classifications(self, logits: Floats, labels: Labels) -> list[tuple[Floats, Labels]]:
        """One for each label, into 0 (without it) and 1 (with it)."""
        probabilities = sigmoid(logits)
        return [
            (np.stack([1 - with_label, with_label], axis=1), has_label)
            for with_label, has_label in zip(probabilities.T, labels.T, strict=True)
        ]

    def describe_correction(
        self,
        label: Label,
        classification: int,
        suggested: int,
        probabilities: Floats,
        label_names: Sequence[str],
    ) -> Correction:
        places = _places(label)
        is_there = classification in places
        rather = _join(sorted({*places} ^ {classification}), label_names) or "no label"
        name = f"{'without' if is_there else 'with'} {label_names[classification]!r}"
        return Correction(rather, f"rather {name} ({probabilities[1]:.0%})")

    def worst_answers(
        self,
        logits: Floats,
        labels: Labels,
        calibration: Calibration,
        label_names: Sequence[str],
        max_answers: int,
    ) -> list[WrongAnswer]:
        """Of each image the label that it was most wrongly given or denied."""
        scores, has_label = calibration.scores(logits), labels == 1
        is_right = calibration.answers(logits) == has_label
        wrongness = np.where(is_right, 0, np.where(has_label, 1 - scores, scores))
        worst = wrongness.argmax(axis=1)
        order = np.argsort(-wrongness.max(axis=1), kind="stable")[:max_answers]
        found = []
        for index in order[wrongness[order].any(axis=1)]:
            label = int(worst[index])
            name = label_names[label]
            found.append(
                WrongAnswer(
                    index=int(index),
                    truth=_join(np.flatnonzero(labels[index]), label_names) or "no label",
                    answer=f"not {name}" if has_label[index, label] else name,
                    score=float(wrongness[index, label]),
                    label=label,
                )
            )
        return found

    def answer_columns(
        self,
        scores: Floats,
        answers: Bools | None,
        labels: Labels,
        label_names: Sequence[str],
    ) -> dict[str, list[str]]:
        named = scores >= 0.5 if answers is None else answers
        return {
            "labels": [_join(np.flatnonzero(row), label_names) or "none" for row in labels],
            "answer": [_join(np.flatnonzero(row), label_names) or "none" for row in named],
            "is it right": [
                "right" if is_right else "wrong" for is_right in (named == labels).all(axis=1)
            ],
        }


def _places(label: Label) -> tuple[int, ...]:
    return (label,) if isinstance(label, int) else label


def _join(places: Iterable[int], label_names: Sequence[str]) -> str:
    return SEPARATOR.join(label_names[place] for place in places)


MULTI_LABEL: Task = MultiLabel()
