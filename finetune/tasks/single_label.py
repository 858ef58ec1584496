"""One label per image: softmax, accuracy, conformal sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune.evaluation import conformal
from finetune.evaluation.calibration import Bools, Calibration, CalibrationQuality
from finetune.evaluation.class_metrics import (
    ClassMetrics,
    class_log_loss,
    evaluate_classes,
    resample_accuracies,
)
from finetune.evaluation.comparison import PairedScores, compare_accuracies
from finetune.evaluation.metrics import Shares
from finetune.tasks.balance import class_weights, warn_if_imbalanced
from finetune.tasks.strata import (
    NUM_FOLDS,
    assign_class_folds,
    draw_order_of_classes,
    rank_in_classes,
    refill_val_of_classes,
    split_off_val_of_classes,
)
from finetune.tasks.task import Correction, Label, Task, Words, WrongAnswer
from models.errors import GraftError
from models.scores import Floats, Labels, softmax
from models.sources import SplitName

if TYPE_CHECKING:
    import torch


class SingleLabel:
    """See Task. Labels are `int64 [N]`."""

    name = "single-label"
    label_column = "label"
    metric = "accuracy"
    metric_name = "accuracy"
    min_labels = 2
    unsupported_options: tuple[str, ...] = ()
    words = Words(
        label="class",
        labels="classes",
        labels_of_images="classes",
        classifier="An image classifier",
        decisions="images",
        right="right",
        fraction_right="share of right answers",
    )

    def number(self, named: str | tuple[str, ...], numbers: Mapping[str, int]) -> Label:
        assert isinstance(named, str)
        return numbers[named]

    def restore(self, stored: Any) -> Label:
        return int(stored)

    def encode(self, labels: Sequence[Label], num_labels: int) -> Labels:
        return np.array(labels, np.int64)

    def describe(self, label: Label, label_names: Sequence[str]) -> str:
        assert isinstance(label, int)
        return label_names[label]

    def count(self, labels: Labels, num_labels: int) -> npt.NDArray[np.int64]:
        return np.bincount(labels, minlength=num_labels)

    def check_label_names(self, label_names: Sequence[str], data: str) -> None:
        if len(label_names) < self.min_labels:
            raise GraftError(
                f"--data {data}: only one class, {label_names[0]!r}; a classifier needs two or more"
            )

    def find_unlearnable(self, labels: Labels, label_names: Sequence[str]) -> str | None:
        return None

    def assign_folds(self, labels: Labels, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
        return assign_class_folds(labels, num_folds, seed)

    def split_off_val(
        self,
        labels: Labels,
        num_labels: int,
        val_fraction: float,
        seed: int,
        placed: npt.NDArray[np.int64],
    ) -> Bools:
        return split_off_val_of_classes(labels, num_labels, val_fraction, seed, placed)

    def refill_val(
        self, labels: Labels, was_val: Bools, is_val: Bools, can_move: Bools, seed: int
    ) -> Bools:
        return refill_val_of_classes(labels, was_val, is_val, can_move, seed)

    def draw_order(self, labels: Labels, seed: int) -> npt.NDArray[np.int64]:
        return draw_order_of_classes(labels, seed)

    def nested_ranks(self, labels: Labels, num_parts: int, seed: int) -> Shares:
        return rank_in_classes(labels, seed)

    def class_weights(self, labels: Labels, num_labels: int) -> Floats:
        return class_weights(labels, num_labels)

    def warn_if_imbalanced(self, labels: Labels, label_names: tuple[str, ...]) -> None:
        warn_if_imbalanced(labels, label_names)

    def scores(self, logits: Floats) -> Floats:
        return softmax(logits)

    def is_right(self, logits: Floats, labels: Labels) -> Bools:
        return np.asarray(logits.argmax(axis=1) == labels)

    def log_loss(
        self, logits: Floats, labels: Labels, class_weights: Floats | None = None
    ) -> float:
        return class_log_loss(logits, labels, class_weights)

    def loss_and_gradient(self, logits: Floats, labels: Labels, shares: Floats) -> Floats:
        rows = np.arange(len(labels))
        logits -= logits.max(axis=2, keepdims=True)
        chosen = logits[rows, :, labels]
        np.exp(logits, out=logits)
        sums = logits.sum(axis=2)
        losses: Floats = ((np.log(sums) - chosen) * shares.T).sum(axis=0)
        logits *= (shares.T / sums)[:, :, None]
        logits[rows, :, labels] -= shares.T
        return losses

    def fit_temperature(self, logits: Floats, labels: Labels) -> float:
        return conformal.fit_temperature(logits, labels)

    def training_targets(self, labels: Labels) -> list[Any]:
        """Each image's label."""
        return [int(label) for label in labels]

    def losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        class_weights: torch.Tensor | None,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Cross-entropy `[B]`; targets are `int64 [B]`, or `float [B,C]` where images are mixed.

        `class_weights` `[C]` multiply what each class adds; `label_smoothing` spreads this part of
        every target over all classes (Szegedy et al. 2016, arXiv 1512.00567).
        """
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            logits, targets, class_weights, reduction="none", label_smoothing=label_smoothing
        )

    def evaluate(
        self, logits: Floats, labels: Labels, answers: Bools | None = None
    ) -> ClassMetrics:
        return evaluate_classes(logits, labels)

    def calibrate_probe(
        self,
        out_of_fold_logits: Floats,
        temperature: float,
        train_labels: Labels,
        logits: Mapping[SplitName, Floats],
        labels: Mapping[SplitName, Labels],
        coverage: float,
    ) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
        return conformal.calibrate_probe(
            out_of_fold_logits, temperature, train_labels, logits, labels, coverage
        )

    def calibrate_trained(
        self,
        logits: Mapping[SplitName, Floats],
        labels: Mapping[SplitName, Labels],
        coverage: float,
        seed: int,
    ) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
        folds = self.assign_folds(labels["val"], NUM_FOLDS, seed)
        return conformal.calibrate_trained(logits, labels, coverage, folds)

    def compare(
        self,
        first_logits: Floats,
        second_logits: Floats,
        labels: Labels,
        class_weights: Floats | None = None,
    ) -> PairedScores:
        return compare_accuracies(first_logits, second_logits, labels, class_weights)

    def resampled_scores(self, logits: Sequence[Floats], labels: Labels) -> Shares:
        return resample_accuracies(logits, labels)

    def classifications(self, logits: Floats, labels: Labels) -> list[tuple[Floats, Labels]]:
        """One, into the C classes."""
        return [(softmax(logits), labels)]

    def describe_correction(
        self,
        label: Label,
        classification: int,
        suggested: int,
        probabilities: Floats,
        label_names: Sequence[str],
    ) -> Correction:
        assert isinstance(label, int)
        name, other = label_names[label], label_names[suggested]
        shares = f"{probabilities[suggested]:.0%}, {name!r} {probabilities[label]:.0%}"
        return Correction(other, f"rather {other!r} ({shares})")

    def worst_answers(
        self,
        logits: Floats,
        labels: Labels,
        calibration: Calibration,
        label_names: Sequence[str],
        max_answers: int,
    ) -> list[WrongAnswer]:
        scores = calibration.scores(logits)
        predicted, highest = scores.argmax(axis=1), scores.max(axis=1)
        wrong = np.flatnonzero(predicted != labels)
        return [
            WrongAnswer(
                index=int(index),
                truth=label_names[labels[index]],
                answer=label_names[predicted[index]],
                score=float(highest[index]),
                label=int(predicted[index]),
            )
            for index in wrong[np.argsort(-highest[wrong], kind="stable")][:max_answers]
        ]

    def answer_columns(
        self,
        scores: Floats,
        answers: Bools | None,
        labels: Labels,
        label_names: Sequence[str],
    ) -> dict[str, list[str]]:
        predicted = scores.argmax(axis=1)
        return {
            "label": [label_names[label] for label in labels],
            "answer": [label_names[label] for label in predicted],
            "is it right": [
                "right" if answer == label else "wrong"
                for answer, label in zip(predicted, labels, strict=True)
            ],
            "score": [f"{score:.3f}" for score in scores.max(axis=1)],
        }


SINGLE_LABEL: Task = SingleLabel()
