"""Every part has its share of every label, however the labels come together."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.tasks.strata import stratify, stratify_folds, stratify_val


def draw_rows(num_images: int, shares: list[float], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((num_images, len(shares))) < shares).astype(np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_folds_share_every_label_evenly(seed: int) -> None:
    rows = draw_rows(400, [0.5, 0.3, 0.1, 0.02], seed)
    folds = stratify_folds(rows, 5, seed)
    assert np.bincount(folds).tolist() == [80] * 5
    per_fold = np.stack([rows[folds == fold].sum(axis=0) for fold in range(5)])
    assert np.ptp(per_fold, axis=0).max() <= 2
    # By chance alone, a common label's numbers differ by ten.
    assert np.array_equal(folds, stratify_folds(rows, 5, seed))
    assert not np.array_equal(folds, stratify_folds(rows, 5, seed + 1))


def test_every_label_has_an_image_on_both_sides() -> None:
    rows = np.zeros((100, 10), np.int64)
    for label in range(10):
        rows[[2 * label, 2 * label + 1], label] = 1
    side = stratify_val(rows, 0.2, 0)
    assert all(sorted(side[rows[:, label] == 1]) == [0, 1] for label in range(10))
    assert side.sum() == 20


def test_a_rare_label_that_comes_with_a_common_one_is_still_shared() -> None:
    rows = np.zeros((100, 2), np.int64)
    rows[:50, 0] = 1
    rows[:4, 1] = 1
    side = stratify_val(rows, 0.25, 3)
    assert (side[rows[:, 1] == 1].sum(), side[rows[:, 0] == 1].sum(), side.sum()) == (1, 12, 25)


def test_what_has_a_place_keeps_it_and_counts() -> None:
    rows = draw_rows(200, [0.5, 0.25])
    placed = np.full(200, -1)
    placed[:30] = 1
    side = stratify_val(rows, 0.2, 0, placed)
    assert (side[:30] == 1).all()
    assert side.sum() == 40
    assert np.abs(rows[side == 1].sum(axis=0) - 0.2 * rows.sum(axis=0)).max() <= 5


def test_images_of_no_label_fill_the_parts() -> None:
    parts = stratify(
        np.zeros((10, 3), np.int64), np.array([[7.0, 0, 0, 0], [3.0, 0, 0, 0]]), seed=0
    )
    assert np.bincount(parts).tolist() == [7, 3]
