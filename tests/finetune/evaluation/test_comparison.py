"""The fine-tuned model has to be better by more than chance; else the probe is published."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.evaluation.class_metrics import evaluate_classes
from finetune.evaluation.comparison import Comparison, compare_accuracies
from finetune.tasks.balance import class_weights


def compare(num_gained: int, num_lost: int, num_images: int) -> Comparison:
    """Of models that both get half of the other images right."""
    labels = np.zeros(num_images, np.int64)
    probe, tuned = (np.arange(num_images) % 2 for _ in range(2))
    probe[:num_gained], tuned[:num_gained] = 1, 0
    probe[num_gained : num_gained + num_lost], tuned[num_gained : num_gained + num_lost] = 0, 1
    logits = np.eye(2, dtype=np.float32)
    scores = compare_accuracies(logits[probe], logits[tuned], labels)
    return Comparison(scores, probe_seconds=1.5, train_seconds=60)


@pytest.mark.parametrize(
    ("num_gained", "num_lost", "published", "words"),
    [
        (20, 3, "fine-tuned", "fine-tuned is better"),
        (12, 8, "probe", "a tie"),
        (0, 0, "probe", "a tie"),
        (3, 20, "probe", "the probe is better"),
    ],
)
def test_the_better_one_is_published_and_the_probe_on_a_tie(
    num_gained: int, num_lost: int, published: str, words: str
) -> None:
    comparison = compare(num_gained, num_lost, 400)
    assert comparison.publishes == published
    assert words in str(comparison)
    assert "in 60 s" in str(comparison)
    report = json.loads(json.dumps(comparison.to_dict()))
    assert (report["published"], report["difference"]) == (
        published,
        pytest.approx((num_gained - num_lost) / 400),
    )


def test_epochs_that_gave_nothing_are_no_tie() -> None:
    logits = np.eye(2, dtype=np.float32)
    scores = compare_accuracies(logits, logits, np.arange(2))
    comparison = Comparison(scores, probe_seconds=1.5, train_seconds=60, has_learnt=False)
    assert comparison.publishes == "probe"
    assert str(comparison).endswith(
        "no epoch was better than the head that they began from, so the probe is published"
    )


def test_the_interval_is_of_the_same_images_and_not_of_two_samples() -> None:
    """Two models agree on all but 20 of 400 images.

    Apart, each accuracy is uncertain by 5 points, their difference by 2.
    """
    interval = compare(15, 5, 400).scores.interval
    width = interval.high - interval.low
    assert width == pytest.approx(
        2 * 1.96 * np.sqrt(20 / 400 - (10 / 400) ** 2) / np.sqrt(400), rel=0.1
    )
    assert interval.low < 10 / 400 < interval.high


def test_balanced_it_goes_by_what_a_rare_class_gains() -> None:
    """Of 400 images 360 are of class 0, where the fine-tuned model loses 12.

    Of the 40 others it gains 12.
    """
    labels = np.repeat([0, 1], [360, 40])
    probe, tuned = np.zeros(400, np.int64), np.zeros(400, np.int64)
    tuned[:12], tuned[-12:] = 1, 1
    logits = np.eye(2, dtype=np.float32)
    plain = compare_accuracies(logits[probe], logits[tuned], labels)
    assert Comparison(plain, probe_seconds=1.5, train_seconds=60).publishes == "probe"
    weights = class_weights(labels, 2)
    balanced = compare_accuracies(logits[probe], logits[tuned], labels, weights)
    comparison = Comparison(balanced, probe_seconds=1.5, train_seconds=60)
    assert comparison.publishes == "fine-tuned"
    assert balanced.first == pytest.approx(0.5)
    assert balanced.second == pytest.approx(
        evaluate_classes(logits[tuned], labels).balanced_accuracy
    )
    assert "+13.3 points of balanced accuracy (95%: " in str(comparison)
    assert comparison.to_dict()["by"] == "balanced_accuracy"
