"""The answers of a model whose images have one label each, from its scores."""

from __future__ import annotations

import numpy as np
import pytest

from service.tasks.single_label import SingleLabel
from service.tasks.task import Scores

SCORES = np.array([0.5, 0.2, 0.3], np.float32)


def task_of(*label_names: str, threshold: float | None = None) -> SingleLabel:
    return SingleLabel(label_names, temperature=1.0, coverage=None, threshold=threshold)


def scores(*values: float) -> Scores:
    return np.array(values, np.float32)


@pytest.mark.parametrize(("top_k", "num_listed"), [(1, 1), (2, 2), (3, 3), (1000, 3)])
def test_top_k_lists_as_many_labels_as_there_are(top_k: int, num_listed: int) -> None:
    assert len(task_of("a", "b", "c").prediction(SCORES, top_k).top) == num_listed


def test_five_labels_are_listed_by_default() -> None:
    prediction = task_of(*"abcdefg").prediction(scores(*[0.1] * 7), None)
    assert [one.label for one in prediction.top] == list("abcde")


@pytest.mark.parametrize(
    ("threshold", "unsure"), [(None, None), (0.4, False), (0.3, True), (0.6, True), (0.0, True)]
)
def test_an_answer_is_unsure_unless_exactly_one_label_reaches_the_threshold(
    threshold: float | None, unsure: bool | None
) -> None:
    assert task_of("a", "b", "c", threshold=threshold).prediction(SCORES, 1).unsure is unsure


def test_equal_scores_keep_the_order_of_the_labels() -> None:
    prediction = task_of("a", "b", "c", "d").prediction(scores(0.25, 0.25, 0.5, 0.0), 4)
    assert [one.label for one in prediction.top] == ["c", "a", "b", "d"]


def test_scores_are_the_softmax_of_the_logits_over_the_temperature() -> None:
    logits = scores(1.0, -2.0, 1000.0)[None]
    expected = np.exp((logits - 1000) / 2) / np.exp((logits - 1000) / 2).sum()
    task = SingleLabel(("a", "b", "c"), temperature=2.0, coverage=None, threshold=None)
    assert task.scores(logits.copy()) == pytest.approx(expected, abs=1e-6)
