"""Any number of labels per image: sigmoid, and the labels that reach their thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from models.scores import sigmoid
from service.tasks.task import (
    Activation,
    LabelScore,
    Limits,
    Output,
    OutputName,
    Scores,
    rank,
    rounded,
)


class MultiLabelPrediction(BaseModel):
    """The answer for one image of a model whose images have any number of labels.

    Each score is the label's own probability: they do not add up to one.
    """

    labels: list[LabelScore] = Field(
        description="The labels whose score reaches the model's threshold for it, best first; "
        "perhaps none, perhaps several."
    )
    top: list[LabelScore] = Field(description="All labels, or the `top_k` asked for, best first.")


class MultiLabelRow(BaseModel):
    """One image of a multi-label model: every label, its own calibrated probability, and whether
    that reaches the label's threshold."""

    classes: list[str]
    scores: list[float]
    present: list[bool]


class MultiLabelColumns(BaseModel):
    """The same, as columns."""

    classes: list[list[str]]
    scores: list[list[float]]
    present: list[list[bool]]


@dataclass(frozen=True)
class MultiLabel:
    """The task of a model whose images have any number of labels.

    `thresholds` `[C]` are the least scores at which an image has each label.
    """

    label_names: tuple[str, ...]
    temperature: float
    thresholds: Scores
    activation: ClassVar[Activation] = "sigmoid"
    outputs: ClassVar[tuple[Output, ...]] = (
        Output("probabilities", "f", is_per_label=True),
        Output("present", "b", is_per_label=True),
    )

    def scores(self, logits: Scores) -> Scores:
        logits /= self.temperature
        return sigmoid(logits)

    def named_labels(self, row: Scores) -> frozenset[str]:
        return frozenset(self.label_names[column] for column in np.flatnonzero(self._present(row)))

    def limits(self) -> Limits:
        return Limits(coverage=None, threshold=None, thresholds=rounded(self.thresholds))

    def prediction(self, row: Scores, top_k: int | None) -> MultiLabelPrediction:
        ranked, named = rank(row, self.label_names), self.named_labels(row)
        return MultiLabelPrediction(
            labels=[one for one in ranked if one.label in named], top=ranked[:top_k]
        )

    def tensorflow_row(self, row: Scores) -> MultiLabelRow:
        return MultiLabelRow(
            classes=list(self.label_names),
            scores=rounded(row),
            present=self._present(row).tolist(),
        )

    def output(self, name: OutputName, scores: Scores) -> npt.NDArray[Any]:
        return self._present(scores) if name == "present" else scores

    def _present(self, scores: Scores) -> npt.NDArray[np.bool_]:
        return scores >= self.thresholds
