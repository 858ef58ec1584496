"""Augmented views: a crop shifted, scaled and mirrored, drawn from seed, view and image index."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from finetune.config import Augment
from models.preprocess import View

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


@dataclass(frozen=True)
class Views:
    """The views of each training image: the plain crop, then `num - 1` augmented ones."""

    num: int = 1
    augment: Augment = "none"
    seed: int = 0

    def drawing(self, view: int) -> Callable[[int], View | None]:
        """What draws the `view`-th view of the image at an index; None is the plain crop."""
        return functools.partial(draw_view, self.augment if view else "none", self.seed, view)
