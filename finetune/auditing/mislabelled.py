"""Which labels are likely wrong: confident learning on held-out predictions.

Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70 (2021), arXiv 1911.00068. cleanlab, by
the same authors, has more of it; the two steps that are needed here are a few lines, and importing it (with pandas and scikit-learn)
would take longer than a probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.scores import Floats, Labels


@dataclass(frozen=True)
class LabelQuality:
    """Of each sample `[N]`: `score` from 0 to 1, high where its label is likely wrong; the label to suggest; whether it is an issue."""

    score: Floats
    suggested: Labels
    is_issue: npt.NDArray[np.bool_]


def confident_thresholds(probabilities: Floats, labels: Labels) -> Floats:
    """The mean probability `[C]` that each class gets on samples of its own label, 1 where there are none (equation 2)."""
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=own, minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)


def judge_label_rows(
    probabilities: Floats, rows: Labels, out_of_fold: Floats, train_rows: Labels
) -> Iterator[tuple[int, LabelQuality]]:
    """For each label of multi-label data its number, and of each sample whether it is rightly there or missing.

    A label is a classification into 0, without it, and 1, with it, of its own: held-out `probabilities` and `rows` are `[N,C]`, and
    what each class gets on its own samples is taken from the training split's `out_of_fold` and `train_rows`.
    """
    for label in range(rows.shape[1]):
        thresholds = confident_thresholds(
            _with_and_without(out_of_fold[:, label]), train_rows[:, label]
        )
        yield (
            label,
            judge_labels(_with_and_without(probabilities[:, label]), rows[:, label], thresholds),
        )


def _with_and_without(probabilities: Floats) -> Floats:
    return np.stack([1 - probabilities, probabilities], axis=1)


def judge_labels(probabilities: Floats, labels: Labels, thresholds: Floats) -> LabelQuality:
    """From held-out probabilities `[N,C]`: how many labels are wrong is counted by the confident joint, which ones by self-confidence.

    The joint counts a sample under the class that is confident of it, its probability at or above what the class gets on its own; off
    the diagonal are the issues. The ones to look at are as many samples, whose own label got the least of what its class gets.
    """
    rows = np.arange(len(labels))
    joint = np.where(probabilities >= thresholds, probabilities, -1).argmax(axis=1)
    num_issues = int(((probabilities[rows, joint] >= thresholds[joint]) & (joint != labels)).sum())
    score = 1 - np.minimum(1, probabilities[rows, labels] / np.maximum(thresholds[labels], 1e-12))
    others = probabilities.copy()
    others[rows, labels] = -1
    suggested = others.argmax(axis=1)
    is_likelier = others[rows, suggested] > probabilities[rows, labels]
    is_issue = np.zeros(len(labels), bool)
    is_issue[np.argsort(-np.where(is_likelier, score, -1), kind="stable")[:num_issues]] = True
    return LabelQuality(
        score.astype(np.float32), suggested.astype(np.int64), is_issue & is_likelier
    )
