"""Metrics of multi-label answers are scikit-learn's; their intervals are of resampled images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as reference

from finetune.evaluation.comparison import Comparison, compare_average_precisions
from finetune.evaluation.label_metrics import evaluate_labels, measure_average_precision
from finetune.evaluation.metrics import tabulate
from models.scores import sigmoid, softmax


def draw_decisions(
    num_images: int, num_labels: int, *, gain: float = 1.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = (generator.random((num_images, num_labels)) < 0.3).astype(np.int64)
    logits = (generator.normal(-1, 1, labels.shape) + gain * labels).astype(np.float32)
    return logits, labels


@pytest.mark.parametrize("num_labels", [1, 2, 12])
def test_metrics_agree_with_scikit_learn(num_labels: int) -> None:
    logits, labels = draw_decisions(300, num_labels)
    answers = sigmoid(logits) >= 0.4
    found = evaluate_labels(logits, labels, answers)
    assert found.mean_average_precision == pytest.approx(
        reference.average_precision_score(labels, logits, average="macro")
    )
    assert found.macro_f1 == pytest.approx(
        reference.f1_score(labels, answers, average="macro" if num_labels > 1 else "binary")
    )
    assert found.micro_f1 == pytest.approx(reference.f1_score(labels.ravel(), answers.ravel()))
    assert found.exact_match == pytest.approx(reference.accuracy_score(labels, answers))
    assert found.hamming_loss == pytest.approx((labels != answers).mean())
    assert found.loss == pytest.approx(
        reference.log_loss(labels.ravel(), sigmoid(logits).ravel().astype(float)), rel=1e-4
    )
    for label in range(num_labels):
        each = reference.precision_recall_fscore_support(
            labels[:, label], answers[:, label], average=None, labels=[1]
        )
        ours = (found.precision[label], found.recall[label], found.f1[label], found.support[label])
        assert ours == pytest.approx(tuple(value[0] for value in each))


def test_average_precision_counts_ties_together_and_images_as_often_as_they_are_drawn() -> None:
    logits, labels = draw_decisions(200, 3)
    logits = np.round(logits)
    weights = np.random.default_rng(1).integers(0, 4, (20, 200)).astype(np.float32)
    found = measure_average_precision(logits, labels, weights)
    for row, drawn in zip(found, weights, strict=True):
        wanted = [
            reference.average_precision_score(
                labels[:, label], logits[:, label], sample_weight=drawn
            )
            for label in range(3)
        ]
        assert row == pytest.approx(wanted)


def test_a_label_that_no_image_has_takes_no_part() -> None:
    logits, labels = draw_decisions(100, 3)
    labels[:, 1] = 0
    found = evaluate_labels(logits, labels)
    rest = evaluate_labels(logits[:, [0, 2]], labels[:, [0, 2]])
    assert (found.mean_average_precision, found.macro_f1) == (
        rest.mean_average_precision,
        rest.macro_f1,
    )
    as_json = json.loads(json.dumps(found.to_dict(("a", "b", "c")), allow_nan=False))
    assert as_json["per_class"]["b"]["average_precision"] is None
    assert tabulate(found, ("a", "b", "c"))[2] == (
        "b",
        f"{found.precision[1]:.3f}",
        "0.000",
        "0.000",
        "nan",
        "0",
    )


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """The truth is that of 100,000 images, the intervals are those of 200."""
    truth = evaluate_labels(*draw_decisions(100_000, 3, seed=99))
    held = dict.fromkeys(truth.NAMES, 0)
    for seed in range(60):
        intervals = evaluate_labels(*draw_decisions(200, 3, seed=seed)).intervals
        for name in held:
            held[name] += intervals[name].low <= getattr(truth, name) <= intervals[name].high
    # 95 % of 60 is 57; 51 or fewer come once in a thousand times.
    assert min(held.values()) >= 51


def test_a_comparison_pairs_the_images() -> None:
    logits, labels = draw_decisions(400, 4)
    better = logits + 0.3 * labels.astype(np.float32)
    scores = compare_average_precisions(logits, better, labels)
    assert scores.second - scores.first == pytest.approx(
        (scores.interval.low + scores.interval.high) / 2, abs=0.01
    )
    comparison = Comparison(scores, probe_seconds=1, train_seconds=60)
    assert comparison.publishes == "fine-tuned"
    assert "probe_mean_average_precision" in comparison.to_dict()
    same = compare_average_precisions(logits, logits, labels)
    assert Comparison(same, probe_seconds=1, train_seconds=60).publishes == "probe"


def test_sigmoid_is_the_softmax_of_two_and_never_overflows() -> None:
    values = np.array([-1000, -3, 0, 0.5, 1000], np.float32)
    assert sigmoid(values) == pytest.approx(
        softmax(np.stack([np.zeros(5, np.float32), values], axis=1))[:, 1], abs=1e-6
    )
