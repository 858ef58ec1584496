"""What the task of a served model decides: scores from logits, and the shape of an answer.

Each task is a file beside this one; `choose.py` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

Scores = npt.NDArray[np.float32]
Activation = Literal["softmax", "sigmoid"]
OutputName = Literal["label", "score", "probabilities", "present"]

DEFAULT_TOP_K = 5


class LabelScore(BaseModel):
    """A label and its calibrated probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Output:
    """A tensor of the answer, in protocols whose answers are tensors.

    It has one value per image, or one per image and label.
    """

    name: OutputName
    kind: Literal["O", "f", "b"]  # of NumPy's dtype: texts as objects, float32, bool
    is_per_label: bool


class Limits(TypedDict):
    """The limits by which a model answers, as `/v1/models` lists them; None where it has none."""

    coverage: float | None
    threshold: float | None
    thresholds: list[float] | None


class Task(Protocol):
    """One served model's task: its labels, how it scores them, how it answers."""

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def activation(self) -> Activation: ...

    @property
    def outputs(self) -> tuple[Output, ...]: ...

    def scores(self, logits: Scores) -> Scores:
        """Logits `[B,C]` → calibrated probabilities `[B,C]`; `logits` may be overwritten."""

    def named_labels(self, row: Scores) -> frozenset[str]:
        """The labels that an answer of probabilities `[C]` names."""

    def limits(self) -> Limits:
        """What `/v1/models` says of the limits by which it answers."""

    def prediction(self, row: Scores, top_k: int | None) -> BaseModel:
        """Probabilities `[C]` → the answer of `/predict`, with the `top_k` best labels."""

    def tensorflow_row(self, row: Scores) -> BaseModel:
        """Probabilities `[C]` → a row of TensorFlow Serving's `predictions`."""

    def output(self, name: OutputName, scores: Scores) -> npt.NDArray[Any]:
        """Probabilities `[B,C]` → the values of one of `outputs`, `[B]` or `[B,C]`."""


def rank(row: Scores, label_names: Sequence[str], top_k: int | None = None) -> list[LabelScore]:
    """Probabilities `[C]` → the `top_k` best labels, or all; equal scores in the labels' order."""
    columns = np.argsort(-row, kind="stable")[:top_k]
    ranked = zip(columns.tolist(), row[columns].tolist(), strict=True)
    return [
        LabelScore(label=label_names[column], score=round(score, 6)) for column, score in ranked
    ]


def rounded(scores: npt.NDArray[np.floating[Any]]) -> list[float]:
    """A flat array as JSON has it: six digits."""
    return [round(score, 6) for score in scores.astype(np.float64).tolist()]
