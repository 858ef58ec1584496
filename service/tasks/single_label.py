"""One label per image: softmax, the best label, and whether the answer is unsure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from models.scores import is_unsure
from service.tasks.task import (
    DEFAULT_TOP_K,
    Activation,
    LabelScore,
    Limits,
    Output,
    OutputName,
    Scores,
    rank,
    rounded,
)


class Prediction(LabelScore):
    """The best label of an image and its `top_k` labels, best first."""

    unsure: bool | None = Field(
        default=None,
        description="Whether no label's score, or more than one's, reaches the model's threshold: "
        "none fits, or several could be true at the coverage that the model was made for. "
        "null where the model has no threshold.",
    )
    top: list[LabelScore]


class PredictRow(BaseModel):
    """One image: its best label, and every label with its calibrated probability.

    `classes` and `scores` are in the order of the model's labels.
    """

    label: str
    score: float
    classes: list[str]
    scores: list[float]


class PredictColumns(BaseModel):
    """The same, as columns."""

    label: list[str]
    score: list[float]
    classes: list[list[str]]
    scores: list[list[float]]


@dataclass(frozen=True)
class SingleLabel:
    """The task of a model whose images have one label each.

    `threshold` is the least score of a label in a conformal set of this `coverage`.
    """

    label_names: tuple[str, ...]
    temperature: float
    coverage: float | None
    threshold: float | None
    activation: ClassVar[Activation] = "softmax"
    outputs: ClassVar[tuple[Output, ...]] = (
        Output("label", "O", is_per_label=False),
        Output("score", "f", is_per_label=False),
        Output("probabilities", "f", is_per_label=True),
    )

    def scores(self, logits: Scores) -> Scores:
        logits /= self.temperature
        logits -= np.maximum.reduce(logits, axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= np.add.reduce(logits, axis=1, keepdims=True)
        return logits

    def named_labels(self, row: Scores) -> frozenset[str]:
        return frozenset((self.label_names[int(np.argmax(row))],))

    def limits(self) -> Limits:
        return Limits(coverage=self.coverage, threshold=self.threshold, thresholds=None)

    def prediction(self, row: Scores, top_k: int | None) -> Prediction:
        top = rank(row, self.label_names, top_k or DEFAULT_TOP_K)
        unsure = None if self.threshold is None else bool(is_unsure(row, self.threshold))
        return Prediction(label=top[0].label, score=top[0].score, unsure=unsure, top=top)

    def tensorflow_row(self, row: Scores) -> PredictRow:
        numbers, best = rounded(row), int(np.argmax(row))
        return PredictRow(
            label=self.label_names[best],
            score=numbers[best],
            classes=list(self.label_names),
            scores=numbers,
        )

    def output(self, name: OutputName, scores: Scores) -> npt.NDArray[Any]:
        if name == "label":
            return np.array([self.label_names[best] for best in scores.argmax(axis=1)], object)
        return scores.max(axis=1) if name == "score" else scores
