"""The smallest set of levels is taken that is as good as the best one, by out-of-fold loss."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.probe import levels
from finetune.probe.levels import choose_set, solve_on_best_levels
from finetune.probe.solve import L2_PATH, ROUGH_TOLERANCE, solve_probe
from finetune.tasks.multi_label import MULTI_LABEL
from finetune.tasks.single_label import SINGLE_LABEL
from models.engine.engine import Features
from models.scores import Labels

NUM_IMAGES, NUM_CLASSES = 240, 3
SETS = {"last": 8, "upper half": 16, "all": 24}


@pytest.mark.parametrize(
    ("fold_losses", "chosen"),
    [
        ([[0.5, 0.5, 0.5]], 0),
        ([[0.5, 0.6, 0.4], [0.5, 0.6, 0.4]], 0),
        ([[0.5, 0.6, 0.4], [0.4, 0.5, 0.3]], 1),  # better in each fold alike
        ([[0.5, 0.6, 0.4], [0.3, 0.7, 0.4]], 0),  # better by chance
        ([[0.5, 0.6, 0.4], [0.6, 0.7, 0.5]], 0),
        ([[0.9, 0.9, 0.9], [0.5, 0.6, 0.4], [0.5, 0.59, 0.4]], 1),
        ([[0.9, 0.9, 0.9], [0.5, 0.6, 0.4], [0.3, 0.4, 0.2]], 2),
        ([[0.9, 0.9, 0.9], [0.8, 0.8, 0.8], [0.85, 0.85, 0.85]], 1),
        ([[0.51, 0.61, 0.41], [0.5, 0.6, 0.4], [0.5, 0.6, 0.4]], 1),
        ([[0.5, 0.5, 0.5], [0.5, 0.52, 0.4]], 0),
    ],
)
def test_the_smallest_set_within_noise_of_the_best(
    fold_losses: list[list[float]], chosen: int
) -> None:
    assert choose_set(np.array(fold_losses, np.float32)) == chosen


def draw(informative: slice, num_images: int = NUM_IMAGES) -> tuple[Features, Labels]:
    """Noise, but for the columns of a slice, which have a mean for each class."""
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % NUM_CLASSES
    features = generator.standard_normal((num_images, SETS["all"])).astype(np.float32)
    width = len(range(*informative.indices(SETS["all"])))
    means = 1.2 * generator.standard_normal((NUM_CLASSES, width))
    features[:, informative] += means[labels].astype(np.float32)
    return features, labels


@pytest.mark.parametrize(
    ("informative", "chosen"),
    [(slice(0, 8), "last"), (slice(8, 16), "upper half"), (slice(16, 24), "all")],
)
def test_the_levels_that_tell_classes_apart_are_read(informative: slice, chosen: str) -> None:
    features, labels = draw(informative)
    found = solve_on_best_levels(features, labels, NUM_CLASSES, SETS, task=SINGLE_LABEL, seed=0)
    assert found.chosen == chosen
    assert found.probe.weight.shape == (NUM_CLASSES, SETS[chosen])
    assert found.last.weight.shape == (NUM_CLASSES, SETS["last"])
    assert (found.last is found.probe) == (chosen == "last")
    given = (features[:, : SETS[chosen]], labels, NUM_CLASSES)
    roughly = solve_probe(*given, seed=0, l2_path=L2_PATH[::2], tolerance=ROUGH_TOLERANCE)
    expected = solve_probe(*given, seed=0, l2_path=levels._path_near(roughly.l2, 1.0))
    np.testing.assert_allclose(found.probe.weight, expected.weight, atol=1e-4)
    assert found.to_dict()["chosen"] == chosen
    assert found.to_dict()["losses"].keys() == SETS.keys()


def test_of_many_images_a_part_chooses_and_all_are_solved_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(levels, "_MAX_COMPARED", 90)
    features, labels = draw(slice(8, 16))
    found = solve_on_best_levels(features, labels, NUM_CLASSES, SETS, task=SINGLE_LABEL, seed=0)
    assert found.chosen == "upper half"
    assert len(found.probe.out_of_fold_logits) == len(found.last.out_of_fold_logits) == NUM_IMAGES


def test_views_are_solved_on_too() -> None:
    features, labels = draw(slice(16, 24))
    noise = np.random.default_rng(1).normal(0, 0.05, features.shape)
    views = np.concatenate([features, (features + noise).astype(np.float32)])
    found = solve_on_best_levels(views, labels, NUM_CLASSES, SETS, task=SINGLE_LABEL, seed=0)
    assert found.chosen == "all"
    assert len(found.probe.out_of_fold_logits) == NUM_IMAGES


def test_several_labels_an_image_have_levels_too() -> None:
    features, labels = draw(slice(8, 16))
    encoded = np.eye(NUM_CLASSES, dtype=np.int64)[labels]
    found = solve_on_best_levels(features, encoded, NUM_CLASSES, SETS, task=MULTI_LABEL, seed=0)
    assert found.chosen == "upper half"
