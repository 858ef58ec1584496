"""The parts of an answer that protocols share: labels in the order of their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.checkpoint import Checkpoint
from models.scores import is_unsure
from service.inference.predictor import Scores, named_labels
from service.protocols.schemas import LabelScore, MultiLabelPrediction, Prediction


def rank(row: Scores, label_names: Sequence[str], top_k: int | None = None) -> list[LabelScore]:
    """Probabilities `[C]` → the `top_k` best labels, or all, ties in the order of the labels."""
    columns = np.argsort(-row, kind="stable")[:top_k]
    ranked = zip(columns.tolist(), row[columns].tolist(), strict=True)
    return [
        LabelScore(label=label_names[column], score=round(score, 6)) for column, score in ranked
    ]


def top_prediction(
    row: Scores, label_names: Sequence[str], top_k: int, threshold: float | None = None
) -> Prediction:
    """Probabilities `[C]` → the best label and the `top_k` best, ties in the order of the labels; with a threshold, if unsure."""
    top = rank(row, label_names, top_k)
    unsure = None if threshold is None else bool(is_unsure(row, threshold))
    return Prediction(label=top[0].label, score=top[0].score, unsure=unsure, top=top)


def multi_label_prediction(
    row: Scores, checkpoint: Checkpoint, top_k: int | None
) -> MultiLabelPrediction:
    """Probabilities `[C]` → the labels that reach their thresholds, and the `top_k` best of all, or all."""
    ranked = rank(row, checkpoint.label_names)
    named = set(named_labels(row, checkpoint))
    return MultiLabelPrediction(
        labels=[one for one in ranked if one.label in named], top=ranked[:top_k]
    )
