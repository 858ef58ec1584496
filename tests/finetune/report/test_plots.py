"""Pictures are whole PNGs of the size that they say, and show what they are drawn from."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from finetune.monitor import Picture
from finetune.report.plots import (
    MeasuredBackbone,
    Mistake,
    draw_backbones,
    draw_confusion,
    draw_mistakes,
)

RED = (200, 30, 60)


def decode(picture: Picture) -> npt.NDArray[np.int64]:
    """`[H,W,3]`."""
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.format == "PNG"
        assert image.size == (picture.width, picture.height)
        return np.asarray(image.convert("RGB")).astype(int)


def test_mistakes_show_their_crops() -> None:
    crop = np.full((32, 32, 3), RED, np.uint8)
    shown = decode(draw_mistakes([Mistake(crop, "cat", "dog", 0.87)] * 7))
    assert (shown == RED).all(axis=2).mean() > 0.1
    none = decode(draw_mistakes([]))
    assert not (none == RED).all(axis=2).any()
    assert none.shape[1] > 200


def test_a_confusion_shades_where_the_images_are() -> None:
    diagonal, flipped = (
        decode(draw_confusion(np.asarray(confusion), ("a", "b"))).mean(axis=2)
        for confusion in ([[1, 0], [0, 1]], [[0, 1], [1, 0]])
    )
    height, width = (size // 2 for size in diagonal.shape)
    assert diagonal[:height, :width].mean() < diagonal[:height, width:].mean() - 20
    assert flipped[:height, :width].mean() > flipped[:height, width:].mean() + 20


@pytest.mark.parametrize("num_classes", [2, 40, 120])
def test_a_confusion_of_any_number_of_classes_has_a_bounded_size(num_classes: int) -> None:
    names = tuple(f"class {label}" for label in range(num_classes))
    picture = draw_confusion(np.eye(num_classes, dtype=np.int64), names)
    decode(picture)
    assert 300 < picture.width <= 1600


def test_names_in_any_letters_are_drawn() -> None:
    """Two names of one alphabet would look the same if the font lacked its letters."""
    confusion = np.eye(2, dtype=np.int64)
    for name, other in (("кот", "пёс"), ("γάτα", "σκύλ"), ("<b>", "|\"'")):
        first, second = (draw_confusion(confusion, (shown, "a")) for shown in (name, other))
        assert first.png != second.png


def test_the_plot_of_backbones_shows_each_inside_its_frame() -> None:
    long_name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k" * 3
    backbones = [
        MeasuredBackbone("one", 0.9, 0.8, 0.95, 100, "fp32"),
        MeasuredBackbone(long_name, 0.85, 0.8, 0.9, 10_000, "bf16"),
        MeasuredBackbone(long_name, 0.7, 0.6, 0.8, 3, "bf16"),
    ]
    pixels = decode(draw_backbones(backbones, backbones[0]))
    is_accent = (np.abs(pixels - (0x0B, 0x69, 0xA3)) < 30).all(axis=2)
    assert is_accent.any()
    # Names end before the picture does.
    assert (pixels[:, -4:] == 255).all()
    alone = decode(draw_backbones(backbones[:1], backbones[0]))
    assert not (alone == 255).all()


def test_backbones_of_one_speed_and_accuracy_are_drawn() -> None:
    same = [MeasuredBackbone(name, 1.0, 1.0, 1.0, 50, "fp32") for name in ("one", "two")]
    decode(draw_backbones(same, same[1]))
