"""Confident learning: labels come first whose image another class is confident of."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.auditing.mislabelled import confident_thresholds, judge_labels
from finetune.probe.solve import solve_probe
from models.scores import softmax


def test_thresholds_are_what_a_class_gets_on_its_own() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.7, 0.3, 0], [0.4, 0.6, 0]], np.float32)
    np.testing.assert_allclose(
        confident_thresholds(probabilities, np.array([0, 0, 1])), [0.8, 0.6, 1.0], rtol=1e-6
    )


def test_as_many_as_others_are_confident_of_and_the_least_confident_first() -> None:
    thresholds = np.array([0.9, 0.4, 0.5], np.float32)
    probabilities = np.array(
        [
            [
                0.6,
                0.35,
                0.05,
            ],  # labelled 1: class 0 is likelier, and not as sure as it is of its own
            [0.05, 0.55, 0.4],  # labelled 0: an issue
            [0.05, 0.9, 0.05],  # labelled 2: an issue
            [0.05, 0.9, 0.05],  # labelled 1
        ],
        np.float32,
    )
    quality = judge_labels(probabilities, np.array([1, 0, 2, 1]), thresholds)
    assert quality.is_issue.tolist() == [False, True, True, False]
    assert quality.suggested[quality.is_issue].tolist() == [1, 1]
    np.testing.assert_allclose(quality.score, [1 - 0.35 / 0.4, 1 - 0.05 / 0.9, 0.9, 0], rtol=1e-5)


def test_labels_that_fit_are_no_issue() -> None:
    probabilities = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]] * 0.7 + 0.1
    quality = judge_labels(
        probabilities,
        np.array([0, 1, 2, 0]),
        confident_thresholds(probabilities, np.array([0, 1, 2, 0])),
    )
    assert not quality.is_issue.any()


@pytest.mark.parametrize("seed", range(3))
def test_flipped_labels_of_overlapping_classes_come_first(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(5), 100)
    features = (
        1.2 * generator.normal(size=(5, 16))[truth] + generator.normal(size=(500, 16))
    ).astype(np.float32)
    labels = truth.copy()
    flipped = generator.choice(500, 25, replace=False)
    labels[flipped] = (labels[flipped] + generator.integers(1, 5, 25)) % 5
    probe = solve_probe(features, labels, 5, seed=0)
    probabilities = softmax(probe.out_of_fold_logits / probe.temperature)
    quality = judge_labels(probabilities, labels, confident_thresholds(probabilities, labels))
    first = np.argsort(-quality.score)[:50]
    assert np.isin(flipped, first).mean() >= 0.8
    assert (quality.suggested[flipped] == truth[flipped]).mean() >= 0.8


def test_a_class_without_samples_is_never_suggested() -> None:
    probabilities = np.array([[0.2, 0.8], [0.9, 0.1]], np.float32)
    thresholds = confident_thresholds(probabilities, np.array([0, 0]))
    assert not judge_labels(probabilities, np.array([0, 0]), thresholds).is_issue.any()
