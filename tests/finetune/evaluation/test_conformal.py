"""Scores mean what they say on unseen images, and conformal sets cover as often as was asked."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from finetune.evaluation.conformal import (
    calibrate_probe,
    calibrate_trained,
    conformal_threshold,
    measure_class_reliability,
)
from finetune.probe.solve import solve_probe
from finetune.tasks.strata import assign_class_folds
from models.scores import is_unsure, softmax


def noisy_digits(noise: float = 4) -> tuple[np.ndarray, np.ndarray]:
    features, labels = load_digits(return_X_y=True)
    return (features + np.random.default_rng(0).normal(0, noise, features.shape)).astype(
        np.float32
    ), labels.astype(np.int64)


def drawn_from_their_scores(
    num_images: int, scale: float = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, `scale` times too large, and labels drawn from what the right ones say."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (num_images, 4)).astype(np.float32)
    labels = (
        (softmax(logits).cumsum(axis=1) < generator.random((num_images, 1))).sum(axis=1).clip(max=3)
    )
    return scale * logits, labels


def test_reliability_is_counted_by_hand() -> None:
    scores = np.array([[0.61, 0.39], [0.65, 0.35], [0.05, 0.95], [0.0, 1.0]], np.float32)
    found = measure_class_reliability(scores, np.array([0, 1, 1, 1]))
    # (9/15, 10/15] holds 0.61 and 0.65, one of them right; (14/15, 1] holds 0.95 and 1.0, both
    # right.
    assert np.flatnonzero(found.counts).tolist() == [9, 14]
    assert found.accuracies[[9, 14]].tolist() == [0.5, 1.0]
    assert found.scores[[9, 14]] == pytest.approx([0.63, 0.975])
    assert found.error == pytest.approx(0.5 * 0.13 + 0.5 * 0.025, abs=1e-6)


def test_the_error_of_scores_that_are_true_is_small_and_of_bold_ones_is_not() -> None:
    logits, labels = drawn_from_their_scores(20_000)
    assert measure_class_reliability(softmax(logits), labels).error < 0.015
    assert measure_class_reliability(softmax(4 * logits), labels).error > 0.1


def test_the_threshold_is_the_score_that_enough_true_labels_reach() -> None:
    of_true = (
        np.arange(1, 20) / 20
    )  # 19 images; 95 % of 19 + 1 is all of them, 90 % all but the least, 50 % ten
    scores = np.stack([of_true, 1 - of_true], axis=1).astype(np.float32)
    labels = np.zeros(19, np.int64)
    assert [
        conformal_threshold(scores, labels, coverage) for coverage in (0.95, 0.9, 0.5)
    ] == pytest.approx([0.05, 0.1, 0.5])
    assert conformal_threshold(scores[1:], labels[1:], 0.95) == 0
    assert conformal_threshold(scores, labels, 1e-12) == pytest.approx(0.95)


def test_an_answer_is_unsure_unless_exactly_one_label_reaches_the_threshold() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45]], np.float32)
    assert is_unsure(scores, 0.5).tolist() == [False, False, False]
    assert is_unsure(scores, 0.42).tolist() == [False, False, True]
    assert is_unsure(scores, 0.7).tolist() == [False, True, True]
    assert is_unsure(scores, 0).all()


@pytest.mark.parametrize("coverage", [0.9, 0.95])
def test_over_20_splits_a_probe_is_calibrated_and_covers_what_was_asked(coverage: float) -> None:
    """Of 1,797 noisy digits, 1,000 are held out."""
    features, labels = noisy_digits()
    errors, covered = [], []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(labels))
        train, val = order[:-1000], order[-1000:]
        probe = solve_probe(features[train], labels[train], 10, seed=seed)
        _, quality = calibrate_probe(
            probe.out_of_fold_logits,
            probe.temperature,
            labels[train],
            {"val": probe.logits(features[val])},
            {"val": labels[val]},
            coverage,
        )
        errors.append(quality["val"].after.error)
        covered.append(quality["val"].covered)
        assert (
            quality["val"].sure_accuracy
            > 1 - quality["val"].before.counts @ (1 - quality["val"].before.accuracies) / 1000
        )
    assert np.mean(errors) <= 0.03
    assert np.mean(covered) == pytest.approx(coverage, abs=0.02)


def test_a_trained_model_is_calibrated_on_validation_and_judged_on_what_its_fit_did_not_see() -> (
    None
):
    """Validation is measured by cross-validation, so that it is not flattered by its own fit."""
    logits, labels = drawn_from_their_scores(3000, scale=3)
    held_out = drawn_from_their_scores(3000, scale=3, seed=1)
    calibration, quality = calibrate_trained(
        {"val": logits, "test": held_out[0]},
        {"val": labels, "test": held_out[1]},
        0.9,
        folds=assign_class_folds(labels, 5, 0),
    )
    assert calibration.temperature == pytest.approx(3, rel=0.05)
    assert "validation images" in calibration.basis
    for split in ("val", "test"):
        assert quality[split].before.error > 0.1
        assert quality[split].after.error < 0.03
        assert quality[split].covered == pytest.approx(0.9, abs=0.02)
    # Each fold is judged by the others, which here are too few for a threshold: all is unsure.
    few, few_labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]], np.array([0, 1, 2, 1, 2, 0])
    folds = assign_class_folds(few_labels, 5, 0)
    _, quality = calibrate_trained({"val": few}, {"val": few_labels}, 0.95, folds)
    assert quality["val"].unsure == 1


def test_too_few_images_to_promise_anything_are_said_to_be() -> None:
    features, labels = noisy_digits()
    chosen = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(5)])
    probe = solve_probe(features[chosen], labels[chosen], 5, seed=0)
    calibration, quality = calibrate_probe(
        probe.out_of_fold_logits,
        probe.temperature,
        labels[chosen],
        {"val": probe.logits(features[:50])},
        {"val": labels[:50] % 5},
        0.95,
    )
    assert calibration.threshold == 0
    assert quality["val"].unsure == 1
    assert quality["val"].to_dict()["sure_accuracy"] is None
    assert "too few images" in quality["val"].describe()
