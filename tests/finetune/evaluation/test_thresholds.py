"""Thresholds of best F1, and multi-label scores that mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from finetune.evaluation.label_metrics import label_log_loss
from finetune.evaluation.thresholds import (
    best_thresholds,
    calibrate_probe,
    calibrate_trained,
    fit_temperature,
    measure_label_reliability,
)
from finetune.probe.solve import solve_probe
from finetune.tasks.multi_label import MULTI_LABEL
from finetune.tasks.strata import stratify_folds
from models.scores import sigmoid


def draw_features(num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three labels, each by a direction of its own, that come together in any way."""
    generator = np.random.default_rng(seed)
    features = generator.normal(0, 1, (num_images, 12)).astype(np.float32)
    directions = np.random.default_rng(7).normal(0, 1, (12, 3))
    labels = (
        features @ directions + np.array([-1, -3, 0.5]) + generator.logistic(0, 1, (num_images, 3))
        > 0
    ).astype(np.int64)
    return features, labels


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = np.round(generator.random((80, 4)), 2 if seed % 2 else 6).astype(np.float32)
    labels = (generator.random(scores.shape) < scores * [1, 0.7, 0.4, 0.1]).astype(np.int64)
    thresholds = best_thresholds(scores, labels)
    for label, threshold in enumerate(thresholds):
        possible = max(
            f1_score(labels[:, label], scores[:, label] >= other) for other in scores[:, label]
        )
        assert f1_score(labels[:, label], scores[:, label] >= threshold) == pytest.approx(possible)


def test_a_label_that_no_image_has_is_named_from_a_half() -> None:
    assert best_thresholds(
        np.full((5, 1), 0.9, np.float32), np.zeros((5, 1), np.int64)
    ).tolist() == [0.5]


def test_the_probe_is_a_logistic_regression_for_each_label() -> None:
    features, labels = draw_features(300)
    probe = solve_probe(features, labels, 3, task=MULTI_LABEL, seed=0, l2_path=(0.01,))
    scale = features.std(axis=0)
    for label in range(3):
        reference = LogisticRegression(C=1 / (0.01 * len(labels)), tol=1e-8).fit(
            (features - features.mean(axis=0)) / scale, labels[:, label]
        )
        assert probe.weight[label] * scale == pytest.approx(reference.coef_[0], abs=0.02)


def test_strength_and_temperature_are_chosen_on_held_out_images() -> None:
    features, labels = draw_features(300)
    probe = solve_probe(features, labels, 3, task=MULTI_LABEL, seed=0)
    held_out = draw_features(5000, seed=1)
    logits = probe.logits(held_out[0])
    assert label_log_loss(probe.out_of_fold_logits, labels) == pytest.approx(
        label_log_loss(logits, held_out[1]), rel=0.15
    )
    assert fit_temperature(3 * logits, held_out[1]) == pytest.approx(
        3 * fit_temperature(logits, held_out[1]), rel=1e-3
    )
    folds = stratify_folds(labels, 5, 0)
    assert np.bincount(folds).tolist() == [60] * 5


def test_a_probe_is_calibrated_and_its_thresholds_hold_on_images_it_did_not_see() -> None:
    features, labels = draw_features(600)
    held_out, truth = draw_features(3000, seed=1)
    probe = solve_probe(features, labels, 3, task=MULTI_LABEL, seed=0)
    logits = probe.logits(held_out)
    calibration, quality = calibrate_probe(
        probe.out_of_fold_logits, probe.temperature, labels, {"val": logits}, {"val": truth}
    )
    assert quality["val"].after.error < 0.03
    assert np.array_equal(
        quality["val"].answers,
        sigmoid(logits / calibration.temperature) >= calibration.thresholds,
    )
    for label in range(3):
        at_half = f1_score(truth[:, label], logits[:, label] >= 0)
        assert f1_score(truth[:, label], quality["val"].answers[:, label]) >= at_half - 0.01
    assert "600 training images" in calibration.basis


def test_a_trained_model_is_not_measured_by_its_own_fit() -> None:
    """Thresholds fitted to random logits look good on the same images, and only on those."""
    generator = np.random.default_rng(0)
    logits, labels = (
        generator.normal(0, 1, (60, 2)).astype(np.float32),
        (generator.random((60, 2)) < 0.2).astype(np.int64),
    )
    folds = stratify_folds(labels, 5, 0)
    calibration, quality = calibrate_trained({"val": logits}, {"val": labels}, folds)
    fitted = sigmoid(logits / np.float32(calibration.temperature)) >= calibration.thresholds
    own, crossed = (
        f1_score(labels.ravel(), answers.ravel()) for answers in (fitted, quality["val"].answers)
    )
    assert crossed < own


def test_reliability_is_of_every_decision() -> None:
    found = measure_label_reliability(
        np.array([[0.95, 0.05], [0.95, 0.05]], np.float32), np.array([[1, 0], [0, 0]])
    )
    assert found.counts.sum() == 4
    assert found.error == pytest.approx((2 * 0.45 + 2 * 0.05) / 4, abs=1e-6)
