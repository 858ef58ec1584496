"""The answers of a model whose images have any number of labels, from its scores."""

from __future__ import annotations

import numpy as np
import pytest

from service.tasks.multi_label import MultiLabel

TASK = MultiLabel(
    ("a", "b", "c"), temperature=2.0, thresholds=np.array([0.5, 0.3, 0.9], np.float32)
)
SCORES = np.array([0.5, 0.6, 0.8], np.float32)


def test_an_answer_names_the_labels_that_reach_their_thresholds() -> None:
    prediction = TASK.prediction(SCORES, top_k=2)
    assert [one.label for one in prediction.labels] == ["b", "a"]
    assert [one.label for one in prediction.top] == ["c", "b"]
    assert TASK.named_labels(SCORES) == {"a", "b"}
    assert TASK.output("present", SCORES[None]).tolist() == [[True, True, False]]
    assert TASK.tensorflow_row(SCORES).present == [True, True, False]


def test_all_labels_are_listed_by_default_and_perhaps_none_is_named() -> None:
    prediction = TASK.prediction(np.zeros(3, np.float32), None)
    assert (prediction.labels, len(prediction.top)) == ([], 3)


def test_scores_are_the_sigmoid_of_each_logit_over_the_temperature() -> None:
    logits = np.array([[1.0, -2.0, 1000.0]], np.float32)
    expected = 1 / (1 + np.exp(-logits / 2))
    assert TASK.scores(logits.copy()) == pytest.approx(expected, abs=1e-6)
