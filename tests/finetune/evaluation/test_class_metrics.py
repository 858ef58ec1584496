"""Metrics are scikit-learn's, and hold where classes are never predicted or never there."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from finetune.evaluation.class_metrics import evaluate_classes
from finetune.evaluation.metrics import most_confused
from models.scores import softmax


def random_answers(num_images: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_images)
    logits = generator.normal(0, 1, (num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), labels] += 1
    return logits, labels


@pytest.mark.parametrize(("num_images", "num_classes"), [(200, 2), (500, 7), (30, 25)])
def test_metrics_agree_with_scikit_learn(num_images: int, num_classes: int) -> None:
    logits, labels = random_answers(num_images, num_classes, 1)
    found, predicted, present = (
        evaluate_classes(logits, labels),
        logits.argmax(axis=1),
        np.unique(labels),
    )
    scores = softmax(logits).astype(float)
    scores /= scores.sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = reference.precision_recall_fscore_support(
            labels, predicted, labels=range(num_classes), zero_division=0
        )
        assert found.balanced_accuracy == pytest.approx(
            reference.balanced_accuracy_score(labels, predicted)
        )
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found.macro_f1 == pytest.approx(
        reference.f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    )
    assert found.loss == pytest.approx(
        reference.log_loss(labels, scores, labels=range(num_classes)), rel=1e-4
    )
    assert np.array_equal(
        found.confusion, reference.confusion_matrix(labels, predicted, labels=range(num_classes))
    )
    for ours, theirs in zip(
        (found.precision, found.recall, found.f1, found.support), each, strict=True
    ):
        assert ours == pytest.approx(theirs)


def test_rows_of_the_confusion_are_true_labels() -> None:
    logits = np.array([[0, 9, 0], [0, 9, 0], [9, 0, 0]], np.float32)
    assert evaluate_classes(logits, np.array([0, 1, 2])).confusion.tolist() == [
        [0, 1, 0],
        [0, 1, 0],
        [1, 0, 0],
    ]


def test_a_class_without_an_image_takes_no_part_in_the_averages() -> None:
    logits = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], np.float32)
    metrics = evaluate_classes(logits, np.array([0, 1, 1]))
    assert metrics.support.tolist() == [1, 2, 0]
    assert metrics.balanced_accuracy == pytest.approx((1 + 0.5) / 2)
    assert metrics.macro_f1 == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.precision.tolist() == [1, 1, 0]


def test_a_class_that_is_never_predicted_has_precision_and_f1_of_zero() -> None:
    metrics = evaluate_classes(np.array([[9, 0], [9, 0]], np.float32), np.array([0, 1]))
    assert (metrics.precision.tolist(), metrics.recall.tolist(), metrics.f1.tolist()) == (
        [0.5, 0],
        [1, 0],
        [pytest.approx(2 / 3), 0],
    )


@pytest.mark.parametrize(("num_images", "num_classes"), [(300, 3), (60, 12)])
def test_intervals_are_those_of_resampling_the_images_one_by_one(
    num_images: int, num_classes: int
) -> None:
    logits, labels = random_answers(num_images, num_classes, 4)
    generator = np.random.default_rng(9)
    resampled = []
    for _ in range(2000):
        rows = generator.integers(0, num_images, num_images)
        one = evaluate_classes(logits[rows], labels[rows])
        resampled.append((one.accuracy, one.balanced_accuracy, one.macro_f1))
    found = evaluate_classes(logits, labels)
    low, high = np.percentile(np.array(resampled), (2.5, 97.5), axis=0)
    assert list(found.intervals) == ["accuracy", "balanced_accuracy", "macro_f1"]
    assert [interval.low for interval in found.intervals.values()] == pytest.approx(low, abs=0.02)
    assert [interval.high for interval in found.intervals.values()] == pytest.approx(high, abs=0.02)
    assert found.intervals == evaluate_classes(logits, labels).intervals


def test_intervals_hold_the_true_accuracy_19_times_of_20() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        labels = generator.integers(0, 2, 400)
        answers = np.where(generator.random(400) < 0.8, labels, 1 - labels)
        interval = evaluate_classes(np.eye(2, dtype=np.float32)[answers], labels).intervals[
            "accuracy"
        ]
        held += interval.low <= 0.8 <= interval.high
    assert 180 <= held <= 199


def test_many_classes_are_resampled_in_parts_and_without_a_mistake_there_is_no_doubt() -> None:
    labels = np.arange(3000)
    intervals = evaluate_classes(np.eye(3000, dtype=np.float32), labels).intervals
    assert {(interval.low, interval.high) for interval in intervals.values()} == {(1.0, 1.0)}


def test_the_most_confused_pairs_come_first_and_only_mistakes() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 0, 2, 2]]
    confusion = evaluate_classes(logits, np.array([0, 0, 0, 1, 1, 2, 2])).confusion
    assert most_confused(confusion, 5) == [
        (0, 1, 2),
        (1, 0, 1),
        (1, 2, 1),
    ]


def test_the_report_is_plain_json_with_each_class() -> None:
    logits, labels = random_answers(50, 3, 0)
    metrics = evaluate_classes(logits, labels)
    report = json.loads(json.dumps(metrics.to_dict(("a", "b", "c"))))
    assert (report["accuracy"], report["loss"], report["num_images"]) == (
        metrics.accuracy,
        metrics.loss,
        50,
    )
    assert (report["balanced_accuracy"], report["macro_f1"]) == (
        metrics.balanced_accuracy,
        metrics.macro_f1,
    )
    assert list(report["per_class"]) == ["a", "b", "c"]
    assert report["per_class"]["b"] == {
        "precision": metrics.precision[1],
        "recall": metrics.recall[1],
        "f1": metrics.f1[1],
        "support": int((labels == 1).sum()),
    }
