"""Dividing images so that every part has its share of every label.

One label per image: a random order of each class is dealt out. Any number of labels: iterative
stratification (Sechidis, Tsoumakas & Vlahavas, "On the Stratification of Multi-label Data", ECML
PKDD 2011, algorithm 1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.scores import Labels

NUM_FOLDS = 5

Parts = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def assign_class_folds(labels: Labels, num_folds: int, seed: int) -> Parts:
    """A fold for each of `labels` `[N]`.

    Two folds at least; no more than the smallest class has images.
    """
    counts = np.bincount(labels)
    num_folds = max(2, min(num_folds, int(counts[counts > 0].min())))
    generator = np.random.default_rng(seed)
    folds = np.empty(len(labels), np.int64)
    offset = 0
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        # Going on where the class before ended keeps the folds equal in size.
        folds[members] = (np.arange(len(members)) + offset) % num_folds
        offset += len(members)
    return folds


def split_off_val_of_classes(
    labels: Labels, num_classes: int, val_fraction: float, seed: int, placed: Parts
) -> Bools:
    """Which images validate, `[N]`: a fraction of each class, at least one image and not all.

    Images with a part in `placed` `[N]` (0 to train, 1 to validate, -1 for none) keep it.
    """
    generator = np.random.default_rng(seed)
    is_val = np.asarray(placed == 1)
    for label in range(num_classes):
        members = labels == label
        new = np.flatnonzero(members & (placed < 0))
        num_members, num_in_val = int(members.sum()), int((members & is_val).sum())
        num_val = min(max(1, round(num_members * val_fraction)), num_members - 1)
        num_new = min(max(0, num_val - num_in_val), len(new))
        is_val[generator.permutation(new)[:num_new]] = True
    return is_val


def refill_val_of_classes(
    labels: Labels, was_val: Bools, is_val: Bools, can_move: Bools, seed: int
) -> Bools:
    """`is_val` `[N]`, and as many of those that `can_move` as each class lost since `was_val`.

    A class that would be left without images on one side stays as it was.
    """
    generator = np.random.default_rng(seed)
    filled = is_val.copy()
    for label in np.unique(labels):
        of_class = labels == label
        movable = np.flatnonzero(of_class & can_move)
        num_missing = max(0, int(was_val[of_class].sum() - filled[of_class].sum()))
        filled[generator.permutation(movable)[:num_missing]] = True
        if filled[of_class].all() or not filled[of_class].any():
            filled[of_class] = was_val[of_class]
    return filled


def draw_order_of_classes(labels: Labels, seed: int) -> Parts:
    """The images in a random order of which any first part is stratified, `[N]`."""
    generator = np.random.default_rng(seed)
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(places)


def rank_in_classes(labels: Labels, seed: int) -> npt.NDArray[np.float64]:
    """For each image the fraction of its class before it in a random order, `[N]`."""
    generator = np.random.default_rng(seed)
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        ranks[members] = np.arange(len(members)) / len(members)
    return ranks


def stratify(
    labels: Labels,
    wanted: npt.NDArray[np.float64],
    *,
    seed: int,
    placed: Parts | None = None,
) -> Parts:
    """A part `[N]` for each row of `labels` `[N,C]`, by iterative stratification.

    `wanted` `[K,1+C]` says how many images in all and of each label a part shall have. Rows with a
    part in `placed` `[N]` (-1 for none) keep it and count. Images of the rarest remaining label
    come first, each for the part that lacks most of that label.
    """
    generator = np.random.default_rng(seed)
    parts = np.full(len(labels), -1) if placed is None else placed.copy()
    # An image counts for its part's size, too, and may have no label.
    counted = np.column_stack([np.ones(len(labels), np.int64), labels])
    missing = wanted - np.stack([counted[parts == part].sum(axis=0) for part in range(len(wanted))])
    free = generator.permutation(np.flatnonzero(parts < 0))
    left = counted[free].sum(axis=0)
    while left[0]:
        column = (
            1 + int(np.where(left[1:] > 0, left[1:], len(labels) + 1).argmin())
            if left[1:].any()
            else 0
        )
        for index in free[(parts[free] < 0) & (counted[free, column] > 0)]:
            most = missing[:, column] == missing[:, column].max()
            # Ties go to the part that lacks most images, then to chance.
            best = np.flatnonzero(most & (missing[:, 0] == missing[most, 0].max()))
            part = best[0] if len(best) == 1 else generator.choice(best)
            parts[index] = part
            missing[part] -= counted[index]
            left -= counted[index]
    return parts


def stratify_folds(labels: Labels, num_folds: int, seed: int) -> Parts:
    """A fold `[N]` for each row of `labels` `[N,C]`, all of one size but for rounding."""
    totals = np.concatenate([[len(labels)], labels.sum(axis=0)])
    return stratify(labels, np.tile(totals / num_folds, (num_folds, 1)), seed=seed)


def stratify_val(
    labels: Labels, val_fraction: float, seed: int, placed: Parts | None = None
) -> Parts:
    """1 to validate and 0 to train, `[N]`: a fraction of each label in `labels` `[N,C]`.

    At least one image of each label is on both sides; one that is alone is to train.
    """
    totals = np.concatenate([[len(labels)], labels.sum(axis=0)])
    in_val = np.clip(np.round(totals * val_fraction), 1, np.maximum(0, totals - 1))
    return stratify(labels, np.stack([totals - in_val, in_val]), seed=seed, placed=placed)


def restratify_val(
    labels: Labels, was_val: Bools, is_val: Bools, can_move: Bools, seed: int
) -> Bools:
    """`is_val` `[N]`, and as many of those that `can_move` as each label lost since `was_val`.

    Images of a label that would be left without images on one side stay where they were.
    """
    counted = np.column_stack([np.ones(len(labels), np.int64), labels])
    in_val = counted[was_val].sum(axis=0)
    wanted = np.stack([counted.sum(axis=0) - in_val, in_val]).astype(np.float64)

    def fill(is_val: Bools, can_move: Bools) -> Bools:
        placed = np.where(can_move, -1, is_val)
        return np.asarray(stratify(labels, wanted, seed=seed, placed=placed) == 1)

    filled = fill(is_val, can_move)
    num_left = labels[filled].sum(axis=0)
    lost = labels[:, (num_left == 0) | (num_left == labels.sum(axis=0))].any(axis=1)
    return fill(np.where(lost, was_val, is_val), can_move & ~lost) if lost.any() else filled
