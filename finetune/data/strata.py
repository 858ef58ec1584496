"""Images of several labels each, divided so that every part has its share of every label.

Iterative stratification: Sechidis, Tsoumakas & Vlahavas, "On the Stratification of Multi-label Data", ECML PKDD 2011, algorithm 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.scores import Labels


def stratify(
    labels: Labels,
    wanted: npt.NDArray[np.float64],
    *,
    seed: int,
    placed: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """A part `[N]` for each row of `labels` `[N,C]`; `wanted` `[K,1+C]` says how many images in all and of each label a part shall have.

    Rows that have a part in `placed` `[N]`, which is -1 for the others, keep it, and what they bring counts. Images of the rarest label
    left come first, each for the part that wants most of that label.
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
            # Ties go to the part that wants most images, then to chance.
            best = np.flatnonzero(most & (missing[:, 0] == missing[most, 0].max()))
            part = best[0] if len(best) == 1 else generator.choice(best)
            parts[index] = part
            missing[part] -= counted[index]
            left -= counted[index]
    return parts


def stratify_folds(labels: Labels, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold `[N]` for each row of `labels` `[N,C]`, all of one size but for rounding."""
    totals = np.concatenate([[len(labels)], labels.sum(axis=0)])
    return stratify(labels, np.tile(totals / num_folds, (num_folds, 1)), seed=seed)


def stratify_val(
    labels: Labels, val_fraction: float, seed: int, placed: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """1 for validation and 0 for training `[N]`: a share of each label in `labels` `[N,C]`, at least one image of it on both sides."""
    totals = np.concatenate([[len(labels)], labels.sum(axis=0)])
    in_val = np.clip(np.round(totals * val_fraction), 1, np.maximum(1, totals - 1))
    return stratify(labels, np.stack([totals - in_val, in_val]), seed=seed, placed=placed)


def assign_folds(labels: Labels, num_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold for each sample `[N]`, seeded and stratified; two folds at least, no more than the smallest class has images."""
    if labels.ndim == 2:
        return stratify_folds(labels, min(num_folds, len(labels)), seed)
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
