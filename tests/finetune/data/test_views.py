"""Augmented views are drawn from seed, view and image alone, within their bounds."""

from __future__ import annotations

import itertools

import pytest

from finetune.config import Augment
from finetune.data.views import draw_view
from models.preprocess import View

NUM_VIEWS = 400


def draw_many(augment: Augment) -> list[View]:
    views = [draw_view(augment, 3, 1, index) for index in range(NUM_VIEWS)]
    assert None not in views
    return views  # type: ignore[return-value]


def test_without_augmentation_it_is_the_plain_crop() -> None:
    assert draw_view("none", 0, 1, 2) is None


def test_a_view_depends_on_seed_view_and_image_and_on_nothing_else() -> None:
    places = list(itertools.product(range(3), repeat=3))
    views = {place: draw_view("flip", *place) for place in places}
    assert len(set(views.values())) == len(places)
    for place in reversed(places):
        assert draw_view("flip", *place) == views[place]


@pytest.mark.parametrize("augment", ["light", "flip"])
def test_shifts_and_scales_fill_their_bounds_and_stay_within(augment: Augment) -> None:
    views = draw_many(augment)
    for shifts in ([view.center_x for view in views], [view.center_y for view in views]):
        assert -0.08 <= min(shifts) < -0.07
        assert 0.07 < max(shifts) <= 0.08
    scales = [view.scale for view in views]
    assert 0.85 <= min(scales) < 0.86
    assert 1.11 < max(scales) <= 1.12


def test_only_flip_mirrors_and_every_other_time() -> None:
    assert not any(view.mirror for view in draw_many("light"))
    assert 0.4 < sum(view.mirror for view in draw_many("flip")) / NUM_VIEWS < 0.6
