"""Augmented views: what a crop may be shifted, scaled and mirrored by, drawn from seed, view and image alone."""

from __future__ import annotations

from typing import Literal

import numpy as np

from models.preprocess import View

Augment = Literal["none", "light", "flip"]
_MAX_SHIFT = 0.08
_SCALES = (0.85, 1.12)


def draw_view(augment: Augment, seed: int, view: int, index: int) -> View | None:
    """The `view`-th view of image `index`; the plain crop (None) without augmentation."""
    if augment == "none":
        return None
    generator = np.random.default_rng((seed, view, index))
    shift_x, shift_y = generator.uniform(-_MAX_SHIFT, _MAX_SHIFT, 2)
    mirror = augment == "flip" and bool(generator.random() < 0.5)
    return View(float(shift_x), float(shift_y), float(generator.uniform(*_SCALES)), mirror)
