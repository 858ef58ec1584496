"""Imbalanced classes are logged, and with --balance count the same in probe, loss and batches."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

from finetune.command_line import parse_options
from finetune.config import Options
from finetune.data.splits import Splits
from finetune.evaluation.class_metrics import class_log_loss, evaluate_classes
from finetune.evaluation.conformal import fit_temperature
from finetune.probe.learning_curve import measure_learning_curve
from finetune.probe.solve import L2_PATH, solve_head, solve_probe
from finetune.tasks.balance import class_weights, draw_balanced, warn_if_imbalanced
from finetune.tasks.single_label import SINGLE_LABEL
from finetune.tasks.strata import assign_class_folds
from finetune.training.state import draw_batches
from models.errors import GraftError
from tests.support.tiny import (
    LABELS,
    PREPROCESS,
    Recorder,
    Trunk,
    build,
    draw_samples,
    options,
    probe_of,
    train_tiny,
)

COUNTS = [200, 60, 12]


pytestmark = pytest.mark.usefixtures("one_thread")


def uneven(seed: int, counts: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Features `[N,20]` of classes that overlap, by default `COUNTS` of each."""
    features, labels = make_classification(
        3000,
        20,
        n_informative=8,
        n_classes=3,
        n_clusters_per_class=1,
        class_sep=0.8,
        random_state=4,
        shuffle=False,
    )
    generator = np.random.default_rng(seed)
    chosen = np.concatenate(
        [
            generator.permutation(np.flatnonzero(labels == label))[:count]
            for label, count in enumerate(counts or COUNTS)
        ]
    )
    return features[chosen].astype(np.float32), labels[chosen]


def test_weights_are_scikit_learns_and_one_on_average() -> None:
    labels = np.repeat([0, 1, 3], COUNTS)
    weights = class_weights(labels, 5)
    assert weights[[0, 1, 3]] == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    )
    assert weights[[2, 4]].tolist() == [0, 0]
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize("start", [0.0, 0.3, 1 - 1e-9])
def test_each_image_is_drawn_as_often_as_its_weight_says(start: float) -> None:
    labels = np.repeat([0, 1, 2], COUNTS)
    weights = class_weights(labels, 3)[labels]
    drawn = draw_balanced(np.random.default_rng(0).permutation(len(labels)), weights, start)
    assert len(drawn) == len(labels)
    times = np.bincount(drawn, minlength=len(labels))
    assert (times >= np.floor(weights)).all()
    assert (times <= np.ceil(weights)).all()


def test_an_epoch_draws_every_class_as_often_and_other_images_in_the_next() -> None:
    labels = np.repeat([0, 1, 2], COUNTS)
    weights = class_weights(labels, 3)[labels]
    epochs = [
        [index for batch in draw_batches(len(labels), 8, 5, epoch, weights) for index in batch]
        for epoch in (1, 2)
    ]
    for drawn in epochs:
        counts = np.bincount(labels[drawn])
        assert counts.sum() == len(labels) // 8 * 8
        assert counts.min() > len(labels) / 3 - 8
    assert sorted(epochs[0]) != sorted(epochs[1])
    assert draw_batches(len(labels), 8, 5, 1, weights) == draw_batches(
        len(labels), 8, 5, 1, weights
    )
    # Copies of an image are spread over the epoch, and no batch is of one class.
    assert (
        max(
            max(Counter(labels[batch]).values())
            for batch in draw_batches(len(labels), 8, 5, 1, weights)
        )
        < 8
    )


def test_the_weighted_probe_is_scikit_learns_balanced_one() -> None:
    features, labels = uneven(0)
    weights = class_weights(labels, 3)
    path = L2_PATH[1:7]
    probe = solve_probe(features, labels, 3, seed=0, class_weights=weights)
    scaled, folds = StandardScaler().fit_transform(features), assign_class_folds(labels, 5, 0)
    losses, heads = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for l2 in path:
            held_out = np.empty((len(labels), 3))
            # The weights of a fold are those of all images.
            counted = compute_sample_weight("balanced", labels)
            for fold in range(5):
                seen = folds != fold
                model = LogisticRegression(C=1 / (l2 * counted[seen].sum()), max_iter=500)
                held_out[~seen] = model.fit(
                    scaled[seen], labels[seen], counted[seen]
                ).predict_proba(scaled[~seen])
            losses.append(sklearn_log_loss(labels, held_out, sample_weight=counted))
            heads.append(
                LogisticRegression(
                    C=1 / (l2 * len(labels)), class_weight="balanced", max_iter=500
                ).fit(scaled, labels)
            )
    best = int(np.argmin(losses))
    assert probe.l2 == path[best]
    assert class_log_loss(probe.out_of_fold_logits, labels, weights) == pytest.approx(
        losses[best], rel=0.01
    )
    assert probe.temperature == fit_temperature(probe.out_of_fold_logits, labels)
    others, _ = uneven(1, [300, 300, 300])
    expected = heads[best].predict(StandardScaler().fit(features).transform(others))
    assert (probe.logits(others).argmax(axis=1) == expected).mean() > 0.99
    weight, bias = solve_head(features, labels, 3, probe.l2, class_weights=weights)
    assert ((others @ weight.T + bias).argmax(axis=1) == expected).mean() > 0.99


def test_weights_bring_balanced_accuracy_where_classes_are_uneven() -> None:
    features, labels = uneven(0)
    others, true = uneven(1, [300, 300, 300])
    plain = solve_probe(features, labels, 3, seed=0)
    weighted = solve_probe(features, labels, 3, seed=0, class_weights=class_weights(labels, 3))
    assert (
        evaluate_classes(weighted.logits(others), true).balanced_accuracy
        > evaluate_classes(plain.logits(others), true).balanced_accuracy + 0.03
    )


def test_equal_weights_change_nothing() -> None:
    features, labels = uneven(0)
    plain = solve_probe(features, labels, 3, seed=0)
    ones = solve_probe(features, labels, 3, seed=0, class_weights=np.ones(3, np.float32))
    assert np.array_equal(ones.weight, plain.weight)
    assert (ones.l2, ones.temperature) == (plain.l2, plain.temperature)


def test_the_learning_curve_of_a_weighted_probe_is_weighted() -> None:
    features, labels = uneven(0)
    others, true = uneven(1, [300, 300, 300])
    curves = [
        measure_learning_curve(
            features,
            labels,
            solve_probe(features, labels, 3, seed=0, class_weights=weights),
            others,
            true,
            SINGLE_LABEL,
            seed=0,
        )
        for weights in (None, class_weights(labels, 3))
    ]
    assert all(
        weighted > plain
        for plain, weighted in zip(curves[0].accuracies, curves[1].accuracies, strict=True)
    )


# Gradient epochs

SPLITS = Splits(
    LABELS,
    tuple(
        sample
        for sample in draw_samples("train", 12, 0)
        if sample.label == 0 or int(sample.key.split()[-1]) < 4
    ),
    draw_samples("val", 4, 100),
)
TRAIN_LABELS = np.array([sample.label for sample in SPLITS.train])


def fit(folder: Path, **changes: object) -> list[float]:
    """Training losses of one epoch without augmentation, dropout being off."""
    backbone = build()
    cast(Trunk, backbone.model.backbone).dropout.p = 0.0
    monitor = Recorder(folder)
    given = options(
        **{"epochs": 1, "augment": "none", "freeze": "none", "batch_norm": "keep", **changes}
    )
    try:
        train_tiny(backbone, SPLITS, probe_of(backbone), given, monitor, folder)
    finally:
        monitor.close()
    return [loss for _, loss in monitor.curves["train/loss"]]


def losses_of(indices: list[int]) -> torch.Tensor:
    """Cross-entropy `[B]` of training images by the network as it starts, by plain means."""
    backbone = build()
    backbone.model.eval()
    crops = torch.from_numpy(
        np.stack([PREPROCESS(SPLITS.train[index].read()) for index in indices])
    ).float()
    images = (crops / 255 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
    with torch.no_grad():
        logits = backbone.model(images.permute(0, 3, 1, 2))
    return torch.nn.functional.cross_entropy(
        logits, torch.tensor(TRAIN_LABELS[indices]), reduction="none"
    )


def test_the_loss_is_weighted_by_class(tmp_path: Path) -> None:
    (first, *_) = draw_batches(len(SPLITS.train), 6, 0, 1)
    weights = torch.tensor(class_weights(TRAIN_LABELS, 3)[TRAIN_LABELS[first]])
    assert fit(tmp_path, balance="weights")[0] == pytest.approx(
        float((weights * losses_of(first)).mean()), rel=1e-5
    )
    assert fit(tmp_path)[0] == pytest.approx(float(losses_of(first).mean()), rel=1e-5)


def test_the_sampler_draws_the_batches_and_leaves_the_loss_alone(tmp_path: Path) -> None:
    weights = class_weights(TRAIN_LABELS, 3)[TRAIN_LABELS]
    (first, *_) = draw_batches(len(SPLITS.train), 6, 0, 1, weights)
    assert first != draw_batches(len(SPLITS.train), 6, 0, 1)[0]
    assert fit(tmp_path, balance="sampler")[0] == pytest.approx(
        float(losses_of(first).mean()), rel=1e-5
    )


# Messages


def test_imbalanced_classes_are_named_with_the_option(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graft"):
        warn_if_imbalanced(np.repeat([0, 1, 2], [20, 2, 15]), LABELS)
        assert not caplog.records
        warn_if_imbalanced(np.repeat([0, 2], [1100, 100]), LABELS)
    assert caplog.messages == [
        "imbalanced classes: red has 1,100 training images, blue has 100; if rare classes matter "
        "as much, --balance weights lets each class count the same"
    ]


def test_balanced_drawing_without_gradient_epochs_is_refused() -> None:
    with pytest.raises(
        GraftError,
        match=r"^--balance sampler: it draws the batches .*; say --freeze until:NAME or none, or "
        r"--balance wei",
    ):
        parse_options(Options, ["--balance", "sampler"])
    assert parse_options(Options, ["--balance", "sampler", "--freeze", "none"]).balance == "sampler"
    assert parse_options(Options, ["--balance", "weights"]).balance == "weights"
