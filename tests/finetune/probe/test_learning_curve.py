"""Parts of the curve are what a probe on fewer images gives; what more are worth is cautious."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from finetune.probe.learning_curve import (
    LearningCurve,
    continue_curve,
    measure_learning_curve,
)
from finetune.probe.solve import solve_head, solve_probe
from finetune.tasks.single_label import SINGLE_LABEL


def draw(count: int, seed: int, spread: float = 3.5) -> tuple[np.ndarray, np.ndarray]:
    """Five blobs in forty dimensions that overlap."""
    centres = np.random.default_rng(0).normal(0, 1, (5, 40))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, count)
    return (centres[labels] + generator.normal(0, spread, (count, 40))).astype(np.float32), labels


def measure(count: int, num_val: int = 4000, spread: float = 3.5) -> LearningCurve:
    features, labels = draw(count, 1, spread)
    probe = solve_probe(features, labels, 5, seed=0)
    return measure_learning_curve(
        features, labels, probe, *draw(num_val, 2, spread), SINGLE_LABEL, seed=0
    )


def curve_of(*accuracies: float) -> LearningCurve:
    """Through the accuracies of 20 to 80 images, on 10,000 validation images: without chance."""
    return continue_curve([20, 40, 60, 80], np.array([accuracies] * 1001), 10_000, "accuracy")


def test_the_curve_rises_and_tells_what_doubling_brings() -> None:
    curve, doubled = measure(400), measure(800)
    assert curve.num_images == pytest.approx((100, 200, 300, 400), abs=5)
    assert curve.accuracies[0] < curve.accuracies[1] < curve.accuracies[3]
    gained = doubled.accuracies[-1] - curve.accuracies[-1]
    assert curve.gain == pytest.approx(gained, abs=0.02)
    assert curve.interval.low < curve.gain < curve.interval.high
    assert "with half the images the probe scores" in str(curve)
    assert json.loads(json.dumps(curve.to_dict()))["num_images"][-1] == 400


def test_a_curve_that_does_not_rise_promises_nothing() -> None:
    """A line through all four rises, though the second half of the images brought nothing."""
    curve = curve_of(0.40, 0.71, 0.66, 0.64)
    assert curve.gain > 0.05
    assert curve.interval.low < 0
    assert str(curve).startswith(
        "with half the images the probe scores 0.7100; doubling them is predicted to add 0 to "
    )
    assert curve_of(0.40, 0.55, 0.62, 0.66).interval.low > 0.05


def test_each_part_is_solved_as_a_probe_on_it_alone_would_be() -> None:
    features, labels = load_digits(return_X_y=True)
    features = (features + np.random.default_rng(0).normal(0, 6, features.shape)).astype(np.float32)
    train, val = slice(0, 800), slice(800, None)
    probe = solve_probe(features[train], labels[train], 10, seed=0)
    curve = measure_learning_curve(
        features[train], labels[train], probe, features[val], labels[val], SINGLE_LABEL, seed=0
    )
    assert curve.accuracies[-1] == pytest.approx(
        float((probe.logits(features[val]).argmax(axis=1) == labels[val]).mean())
    )
    for size, accuracy in zip(curve.num_images[:-1], curve.accuracies[:-1], strict=True):
        alone = solve_probe(features[train][:size], labels[train][:size], 10, seed=0)
        assert accuracy == pytest.approx(
            float((alone.logits(features[val]).argmax(axis=1) == labels[val]).mean()), abs=0.06
        )


def test_a_start_saves_steps_and_moves_no_answer() -> None:
    features, labels = draw(600, 1)
    cold = solve_head(features, labels, 5, 1e-2)
    warm = solve_head(features, labels, 5, 1e-2, solve_head(features[:300], labels[:300], 5, 2e-2))
    held_out = draw(1000, 2)[0]
    answers = [(held_out @ weight.T + bias).argmax(axis=1) for weight, bias in (cold, warm)]
    assert (answers[0] == answers[1]).mean() > 0.98


def test_where_there_is_nothing_to_gain_it_says_so() -> None:
    curve = measure(400, num_val=300, spread=0.3)
    assert curve.accuracies[-1] == 1
    assert curve.gain == pytest.approx(0, abs=0.01)
    assert "doubling them is predicted to add 0 to 0." in str(curve)


def test_every_class_is_in_every_part_and_views_stay_with_their_image() -> None:
    features, labels = draw(12, 1)
    labels[:] = np.arange(12) % 5
    views = np.concatenate([features, features + 0.01])
    probe = solve_probe(views, labels, 5, seed=0, num_views=2)
    curve = measure_learning_curve(views, labels, probe, *draw(50, 2), SINGLE_LABEL, seed=0)
    assert curve.num_images[0] >= 5
    assert list(curve.num_images) == sorted(curve.num_images)
