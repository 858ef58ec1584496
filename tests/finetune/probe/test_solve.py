"""The probe is as good as scikit-learn's best, also on degenerate features.

Its out-of-fold logits come from heads that did not train on the sample.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.preprocessing import StandardScaler

from finetune.evaluation.class_metrics import class_log_loss
from finetune.evaluation.conformal import fit_temperature
from finetune.probe import solve
from finetune.probe.scaling import Scaling
from finetune.probe.solve import (
    L2_PATH,
    Probe,
    soften,
    solve_head,
    solve_probe,
)
from finetune.tasks.strata import assign_class_folds
from models.scores import softmax

PATH = L2_PATH[1:6]


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and held-out features and labels of noisy digits: regularisation matters there."""
    features, labels = load_digits(return_X_y=True)
    noisy = (features + np.random.default_rng(0).normal(0, 6, features.shape)).astype(np.float32)
    return noisy[:500], labels[:500], noisy[500:], labels[500:]


def wide() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """More features than samples, at scales that differ a hundredfold."""
    features, labels = make_classification(
        1200,
        400,
        n_informative=25,
        n_redundant=50,
        n_classes=4,
        class_sep=2.0,
        flip_y=0.05,
        random_state=1,
    )
    features = (features * np.geomspace(0.3, 30, 400) + 5).astype(np.float32)
    return features[:200], labels[:200], features[200:], labels[200:]


def accuracy(probe: Probe, features: np.ndarray, labels: np.ndarray) -> float:
    return float((probe.logits(features).argmax(axis=1) == labels).mean())


def noise(
    count: int, num_features: int, num_classes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, num_features)).astype(np.float32), generator.integers(
        0, num_classes, count
    )


@pytest.mark.parametrize("data", [digits, wide])
def test_it_is_as_accurate_as_scikit_learns_best_on_the_same_path(data: object) -> None:
    train_x, train_y, test_x, test_y = data()  # type: ignore[operator]
    probe = solve_probe(train_x, train_y, int(train_y.max()) + 1, seed=0)
    scaler = StandardScaler().fit(train_x)
    folds = assign_class_folds(train_y, 5, 0)
    losses, scores = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for l2 in PATH:
            held_out = np.empty((len(train_y), int(train_y.max()) + 1))
            for fold in range(5):
                seen = folds != fold
                model = LogisticRegression(C=1 / (l2 * seen.sum()), max_iter=300).fit(
                    scaler.transform(train_x[seen]), train_y[seen]
                )
                held_out[~seen] = model.predict_proba(scaler.transform(train_x[~seen]))
            losses.append(sklearn_log_loss(train_y, held_out))
            model = LogisticRegression(C=1 / (l2 * len(train_y)), max_iter=300).fit(
                scaler.transform(train_x), train_y
            )
            scores.append(model.score(scaler.transform(test_x), test_y))
    best = int(np.argmin(losses))
    assert probe.l2 == PATH[best]
    assert accuracy(probe, test_x, test_y) > max(scores[best] - 0.003, 0.5)
    # The whole solution agrees, not only its accuracy: out-of-fold losses are within a percent.
    assert class_log_loss(probe.out_of_fold_logits, train_y) == pytest.approx(
        losses[best], rel=0.01
    )


def test_in_the_span_of_the_images_the_solution_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_x, train_y, test_x, _ = wide()
    train_x[:, 7] = 3.0  # says nothing
    in_span = solve_probe(train_x, train_y, 4, seed=0)
    monkeypatch.setattr(solve, "_WORTH_A_SPAN", np.inf)
    plain = solve_probe(train_x, train_y, 4, seed=0)
    assert in_span.l2 == plain.l2
    spread = plain.logits(test_x).std()
    np.testing.assert_allclose(in_span.logits(test_x), plain.logits(test_x), atol=0.02 * spread)
    np.testing.assert_allclose(
        in_span.out_of_fold_logits, plain.out_of_fold_logits, atol=0.02 * spread
    )
    assert not in_span.weight[:, 7].any()


@pytest.mark.parametrize("num_views", [1, 2])
def test_of_many_images_a_part_finds_the_strength_and_all_are_solved_on(
    monkeypatch: pytest.MonkeyPatch, num_views: int
) -> None:
    train_x, train_y, test_x, test_y = digits()
    views = np.concatenate([train_x] * num_views)
    whole = solve_probe(views, train_y, 10, seed=0, num_views=num_views)
    monkeypatch.setattr(solve, "_MAX_SEARCHED", 150)
    found = solve_probe(views, train_y, 10, seed=0, num_views=num_views)
    assert found.out_of_fold_logits.shape == whole.out_of_fold_logits.shape
    assert class_log_loss(found.out_of_fold_logits, train_y) == pytest.approx(
        class_log_loss(whole.out_of_fold_logits, train_y), rel=0.01
    )
    assert accuracy(found, test_x, test_y) == pytest.approx(
        accuracy(whole, test_x, test_y), abs=0.01
    )


def test_unfolding_undoes_folding_in() -> None:
    features, _ = noise(50, 6, 3)
    features[:, 2] = 1.0
    scaling = Scaling.of(features * 30 + 5)
    weight, bias = noise(6, 4, 3)[0], noise(1, 4, 3)[0][0]
    weight[2] = 0
    again, same = scaling.fold_in(scaling.unfold(weight, bias))
    np.testing.assert_allclose(again, weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(same, bias, rtol=1e-4, atol=1e-4)


def test_out_of_fold_logits_of_random_labels_are_at_chance() -> None:
    """With 1000 features a head can memorise 300 random labels, but not those it did not see."""
    features, labels = noise(300, 1000, 3)
    probe = solve_probe(features, labels, 3, seed=0)
    out_of_fold = float((probe.out_of_fold_logits.argmax(axis=1) == labels).mean())
    assert 0.2 < out_of_fold < 0.47
    # With hardly any regularisation the head memorises them; out of fold it is still at chance.
    loose = solve_probe(features, labels, 3, seed=0, l2_path=(1e-4,))
    assert accuracy(loose, features, labels) > 0.99
    assert 0.2 < float((loose.out_of_fold_logits.argmax(axis=1) == labels).mean()) < 0.47


def test_the_temperature_of_overconfident_logits_is_high() -> None:
    features, labels = noise(300, 400, 3)
    assert solve_probe(features, labels, 3, seed=0, l2_path=(1e-3,)).temperature > 2


def test_the_same_seed_gives_the_same_bits() -> None:
    train_x, train_y, _, _ = digits()
    one, two = (solve_probe(train_x[:200], train_y[:200], 10, seed=5) for _ in range(2))
    assert np.array_equal(one.weight, two.weight)
    assert np.array_equal(one.bias, two.bias)
    assert np.array_equal(one.out_of_fold_logits, two.out_of_fold_logits)
    assert (one.l2, one.temperature) == (two.l2, two.temperature)
    other = solve_probe(train_x[:200], train_y[:200], 10, seed=6)
    assert not np.array_equal(one.out_of_fold_logits, other.out_of_fold_logits)


def test_features_moved_or_scaled_give_the_same_predictions() -> None:
    train_x, train_y, test_x, _ = digits()
    plain = solve_probe(train_x[:300], train_y[:300], 10, seed=0)
    moved = solve_probe(train_x[:300] * 50 + 1000, train_y[:300], 10, seed=0)
    agree = plain.logits(test_x).argmax(axis=1) == moved.logits(test_x * 50 + 1000).argmax(axis=1)
    assert agree.mean() > 0.995


def test_the_soft_head_is_that_of_the_strongest_l2_and_leaves_something_to_learn() -> None:
    features, labels, *_ = digits()
    probe = solve_probe(features, labels, 10, seed=0)
    soft = soften(probe, features, labels, 10)
    weight, bias = solve_head(features, labels, 10, 1.0)
    assert np.array_equal(soft.weight, weight)
    assert np.array_equal(soft.bias, bias)
    assert np.abs(soft.weight).mean() < np.abs(probe.weight).mean()
    assert class_log_loss(soft.logits(features), labels) > class_log_loss(
        probe.logits(features), labels
    )


def test_two_classes_are_told_apart() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(100) % 2
    features = (generator.normal(size=(100, 8)) + 4 * labels[:, None]).astype(np.float32)
    probe = solve_probe(features, labels, 2, seed=0)
    found: tuple[object, ...] = (
        probe.weight.shape,
        probe.bias.shape,
        probe.weight.dtype,
        probe.bias.dtype,
    )
    assert found == (
        (2, 8),
        (2,),
        np.float32,
        np.float32,
    )
    assert accuracy(probe, features, labels) == 1
    assert probe.out_of_fold_logits.shape == (100, 2)


def test_a_class_with_a_single_sample_is_learned_and_breaks_nothing() -> None:
    generator = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 30 + [2])
    features = (generator.normal(size=(61, 16)) * 0.3 + np.eye(3, 16)[labels] * 5).astype(
        np.float32
    )
    probe = solve_probe(features, labels, 3, seed=0)
    assert np.isfinite(probe.weight).all()
    assert np.isfinite(probe.out_of_fold_logits).all()
    assert 0.05 <= probe.temperature <= 20
    assert accuracy(probe, features, labels) == 1


def test_a_class_without_a_sample_is_never_predicted() -> None:
    features, labels = noise(60, 5, 2)
    probe = solve_probe(features, labels * 2, 3, seed=0)
    assert probe.weight.shape == (3, 5)
    assert 1 not in probe.logits(features).argmax(axis=1)


def test_two_samples_are_enough() -> None:
    features = np.array([[0, 1], [1, 0]], np.float32)
    probe = solve_probe(features, np.array([0, 1]), 2, seed=0)
    assert accuracy(probe, features, np.array([0, 1])) == 1


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6])
def test_constant_features_are_borne(value: float) -> None:
    labels = np.array([0, 0, 0, 1] * 10)
    everywhere = solve_probe(np.full((40, 6), value, np.float32), labels, 2, seed=0)
    assert np.isfinite(everywhere.weight).all()
    # Nothing to go by but how often each class comes.
    assert softmax(everywhere.logits(np.full((1, 6), value, np.float32)))[0] == pytest.approx(
        [0.75, 0.25], abs=0.01
    )
    features, labels = noise(100, 4, 2)
    features[:, 0] = 4 * labels + features[:, 0]
    features[:, 1] = value
    assert accuracy(solve_probe(features, labels, 2, seed=0), features, labels) > 0.9


def test_the_path_ends_early_once_weaker_is_worse() -> None:
    features, labels = noise(100, 50, 2)
    assert solve_probe(features, labels, 2, seed=0).l2 >= L2_PATH[2]


@pytest.mark.parametrize(
    ("counts", "num_folds"),
    [([50, 50], 5), ([7, 13, 21], 5), ([3, 40], 3), ([1, 40], 2), ([2, 2], 2)],
)
def test_folds_are_stratified_and_of_one_size(counts: list[int], num_folds: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    folds = assign_class_folds(labels, 5, 0)
    assert sorted(set(folds.tolist())) == list(range(num_folds))
    for label, count in enumerate(counts):
        sizes = np.bincount(folds[labels == label], minlength=num_folds)
        assert sizes.sum() == count
        assert np.ptp(sizes) <= 1
    assert np.ptp(np.bincount(folds)) <= 1
    assert np.array_equal(folds, assign_class_folds(labels, 5, 0))
    assert len(labels) < 10 or not np.array_equal(folds, assign_class_folds(labels, 5, 1))


def calibrated(count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with their probabilities."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (count, 4)).astype(np.float32)
    labels = np.array(
        [generator.choice(4, p=row / row.sum()) for row in softmax(logits).astype(float)]
    )
    return logits, labels


def test_the_temperature_of_calibrated_logits_is_one_and_follows_their_scale() -> None:
    logits, labels = calibrated()
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.05)
    for factor in (0.25, 2, 5):
        assert fit_temperature(np.float32(factor) * logits, labels) == pytest.approx(
            factor * fit_temperature(logits, labels), rel=1e-3
        )


def test_the_temperature_has_the_least_loss() -> None:
    logits, labels = calibrated(500)
    best = fit_temperature(3 * logits, labels)
    loss = class_log_loss(logits * np.float32(3 / best), labels)
    assert all(
        class_log_loss(logits * np.float32(3 / (best * factor)), labels) > loss
        for factor in (0.9, 0.97, 1.03, 1.1)
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_temperature_stays_in_bounds_where_logits_are_always_right_or_wrong(sign: int) -> None:
    labels = np.arange(30) % 3
    temperature = fit_temperature(sign * 5 * np.eye(3, dtype=np.float32)[labels], labels)
    assert 0.05 <= temperature < 0.3 if sign == 1 else temperature == pytest.approx(20)


def test_logits_that_say_nothing_have_a_temperature() -> None:
    assert np.isfinite(fit_temperature(np.zeros((6, 3), np.float32), np.array([0, 1, 2, 0, 1, 2])))


def test_softmax_and_log_loss_bear_large_logits() -> None:
    logits = np.array([[1e4, -1e4], [1e4, 1e4]], np.float32)
    assert softmax(logits).tolist() == [[1, 0], [0.5, 0.5]]
    assert class_log_loss(logits, np.array([0, 1])) == pytest.approx(np.log(2) / 2)
    assert class_log_loss(logits, np.array([1, 1])) == pytest.approx((2e4 + np.log(2)) / 2)
