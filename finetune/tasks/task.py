"""What a label is: everything in fine-tuning that depends on the kind of task, as one interface.

A new kind of task (ordered classes, regression) is a new file beside single_label.py and
multi_label.py, and a line in choose.py. Nothing outside this folder asks which task it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from finetune.evaluation.calibration import Bools, Calibration, CalibrationQuality
from finetune.evaluation.comparison import PairedScores
from finetune.evaluation.metrics import Metrics, Shares
from models.scores import Floats, Labels
from models.sources import SplitName

if TYPE_CHECKING:
    import torch

# Of one image: its place in the label names; or the places of all labels that it has, in order.
Label = int | tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """How logs, reports and cards speak of a task's labels."""

    label: str  # "class"
    labels: str  # "classes"
    labels_of_images: str  # the same after a number, where it has to be clear how many an image has
    classifier: str  # "An image classifier"
    decisions: str  # what is right or wrong: "images"
    right: str  # and how a right one is called
    fraction_right: str  # the axis of a reliability diagram


@dataclass(frozen=True)
class WrongAnswer:
    """An answer that is not the truth; `label` is the place of the label that it is wrong about."""

    index: int
    truth: str
    answer: str
    score: float
    label: int


@dataclass(frozen=True)
class Correction:
    """What a label that looks wrong should rather be, and why."""

    suggested: str
    detail: str


class Task(Protocol):
    """N images, C label names. `labels` are what `encode` returns; `logits` are `[N,C]`."""

    name: str
    # The column of a CSV that holds an image's label or labels.
    label_column: str
    # The attribute of Metrics that runs are judged by, and its name for people.
    metric: str
    metric_name: str
    # So many label names, and labels with images to train on, are needed.
    min_labels: int
    # Names of options that mean nothing for this task.
    unsupported_options: tuple[str, ...]
    words: Words

    # What labels are

    def number(self, named: str | tuple[str, ...], numbers: Mapping[str, int]) -> Label:
        """The label of an image whose source names it, with the place of each name."""

    def restore(self, stored: Any) -> Label:
        """A label from what JSON made of it."""

    def encode(self, labels: Sequence[Label], num_labels: int) -> Labels:
        """Labels of N images as an array: `int64 [N]`, or `int64 [N,C]` of 0 and 1."""

    def describe(self, label: Label, label_names: Sequence[str]) -> str:
        """A label as a CSV has it."""

    def count(self, labels: Labels, num_labels: int) -> npt.NDArray[np.int64]:
        """How many images have each label, `[C]`."""

    def check_label_names(self, label_names: Sequence[str], data: str) -> None:
        """Raise GraftError if there are too few."""

    def find_unlearnable(self, labels: Labels, label_names: Sequence[str]) -> str | None:
        """What makes a label impossible to learn from these training images, and the way out."""

    # How images are divided

    def assign_folds(self, labels: Labels, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
        """A fold for each image, `[N]`: seeded and stratified."""

    def split_off_val(
        self,
        labels: Labels,
        num_labels: int,
        val_fraction: float,
        seed: int,
        placed: npt.NDArray[np.int64],
    ) -> Bools:
        """Which images validate, `[N]`: seeded and stratified.

        Images with a part in `placed` `[N]` (0 to train, 1 to validate, -1 for none) keep it.
        """

    def refill_val(
        self, labels: Labels, was_val: Bools, is_val: Bools, can_move: Bools, seed: int
    ) -> Bools:
        """`is_val` `[N]`, filled up from those that `can_move` to the shares of `was_val`."""

    def draw_order(self, labels: Labels, seed: int) -> npt.NDArray[np.int64]:
        """The images in a random order of which any first part is stratified, `[N]`."""

    def nested_ranks(self, labels: Labels, num_parts: int, seed: int) -> Shares:
        """A number in [0, 1) for each image, `[N]`: those below k / num_parts are stratified."""

    # How classes are balanced

    def class_weights(self, labels: Labels, num_labels: int) -> Floats:
        """How much an image of each class counts so that all classes count the same, `[C]`."""

    def warn_if_imbalanced(self, labels: Labels, label_names: tuple[str, ...]) -> None:
        """Log a warning if one may want `--balance`."""

    # What a head is solved by

    def scores(self, logits: Floats) -> Floats:
        """Probabilities `[N,C]`."""

    def is_right(self, logits: Floats, labels: Labels) -> Bools:
        """Whether the answer to each image is wholly right, `[N]`, with no threshold fitted."""

    def log_loss(
        self, logits: Floats, labels: Labels, class_weights: Floats | None = None
    ) -> float:
        """The mean cross-entropy in nats; an image counts as `class_weights` `[C]` say."""

    def loss_and_gradient(self, logits: Floats, labels: Labels, shares: Floats) -> Floats:
        """Losses `[K]` of K heads' logits `[N,K,C]`, which become their gradient in place.

        Image n counts as `shares` `[K,N]` say in the loss of each head.
        """

    def fit_temperature(self, logits: Floats, labels: Labels) -> float:
        """What logits are to be divided by for the least log loss."""

    # What gradient epochs minimise

    def training_targets(self, labels: Labels) -> list[Any]:
        """What a data loader gives with each image."""

    def losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        class_weights: torch.Tensor | None,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Of each image `[B]`, from logits `[B,C]` and collated training targets."""

    # How good answers are

    def evaluate(self, logits: Floats, labels: Labels, answers: Bools | None = None) -> Metrics:
        """Metrics of logits; of the `answers` of a CalibrationQuality where it has some."""

    def calibrate_probe(
        self,
        out_of_fold_logits: Floats,
        temperature: float,
        train_labels: Labels,
        logits: Mapping[SplitName, Floats],
        labels: Mapping[SplitName, Labels],
        coverage: float,
    ) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
        """Fit on a probe's out-of-fold logits of its training images; measure on `logits`."""

    def calibrate_trained(
        self,
        logits: Mapping[SplitName, Floats],
        labels: Mapping[SplitName, Labels],
        coverage: float,
        seed: int,
    ) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
        """Fit on "val", where it is measured by cross-validation; measure on all of `logits`."""

    def compare(
        self,
        first_logits: Floats,
        second_logits: Floats,
        labels: Labels,
        class_weights: Floats | None = None,
    ) -> PairedScores:
        """Scores of two heads on the same images, and the interval of their difference."""

    def resampled_scores(self, logits: Sequence[Floats], labels: Labels) -> Shares:
        """Scores of K heads `[1+B,K]`: on the images as they are, then resampled, paired."""

    # Which labels look wrong

    def classifications(self, logits: Floats, labels: Labels) -> list[tuple[Floats, Labels]]:
        """The independent classifications that a label comes down to.

        Of each, probabilities `[N,K]` and which of the K is labelled, `[N]`.
        """

    def describe_correction(
        self,
        label: Label,
        classification: int,
        suggested: int,
        probabilities: Floats,
        label_names: Sequence[str],
    ) -> Correction:
        """What an image's label should rather be.

        By its place among `classifications`, `suggested` is the likelier of the K classes, with
        `probabilities` `[K]`.
        """

    # What reports show

    def worst_answers(
        self,
        logits: Floats,
        labels: Labels,
        calibration: Calibration,
        label_names: Sequence[str],
        max_answers: int,
    ) -> list[WrongAnswer]:
        """The wrong answers of highest score, worst first."""

    def answer_columns(
        self,
        scores: Floats,
        answers: Bools | None,
        labels: Labels,
        label_names: Sequence[str],
    ) -> dict[str, list[str]]:
        """A table of labels and answers: column name → a cell for each image.

        `answers` are those of a CalibrationQuality.
        """
