"""Copies are told from similar images, in memory that grows linearly with the number of images."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from finetune.data import duplicates
from finetune.data.duplicates import Duplicates, Signature, find_duplicates, open_grids
from finetune.data.splits import Sample, Splits
from models.sources import EncodedImage
from tests.support.images import draw_clipart, draw_shape


def splits_of(images: list[bytes], num_val: int = 0) -> Splits:
    samples = tuple(
        Sample(f"image {index}", 0, EncodedImage(data)) for index, data in enumerate(images)
    )
    return Splits(("a",), samples[: len(samples) - num_val], samples[len(samples) - num_val :])


def encode(data: bytes, kind: str, scale: float = 1, **options: int) -> bytes:
    image = Image.open(io.BytesIO(data))
    buffer = io.BytesIO()
    image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    ).save(buffer, kind, **options)
    return buffer.getvalue()


def find(images: list[bytes], num_val: int = 0) -> Duplicates:
    return find_duplicates(splits_of(images, num_val), num_workers=2)


def places(found: Duplicates) -> list[list[int]]:
    return [[int(sample.key.split()[1]) for sample in group] for group in found.groups]


@pytest.mark.parametrize("size", [(200, 160), (56, 48)])
@pytest.mark.parametrize(
    ("kind", "scale", "options"),
    [
        ("JPEG", 1, {"quality": 60}),
        ("JPEG", 1, {"quality": 90}),
        ("WEBP", 1, {"quality": 75}),
        ("PNG", 0.6, {}),
        ("PNG", 0.8, {}),
        ("BMP", 1, {}),
        ("JPEG", 2, {"quality": 75}),
    ],
)
def test_a_picture_encoded_or_sized_anew_is_found(
    kind: str, scale: float, options: dict[str, int], size: tuple[int, int]
) -> None:
    shapes = [
        draw_shape(shape, seed, "PNG", size) for shape in ("circle", "square") for seed in range(10)
    ]
    found = find([*shapes, encode(shapes[3], kind, scale, **options)], num_val=1)
    assert places(found) == [[3, 20]]
    original, copy = found.groups[0]
    assert not found.is_exact(original, copy)
    assert found.similarity(original, copy) > 0.95


def resave(image: Image.Image, kind: str = "PNG", scale: float = 1, **options: int) -> bytes:
    """Over white, resized with Pillow's bicubic filter, encoded."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    buffer = io.BytesIO()
    Image.alpha_composite(white, rgba).convert("RGB").save(buffer, "PNG")
    return encode(buffer.getvalue(), kind, scale, **options)


def as_file(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def grey16(seed: int) -> Image.Image:
    """16 bits a pixel, smooth."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9), np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((120, 120), Image.Resampling.BICUBIC))
    return Image.fromarray(wide.astype(np.uint16) * 257)


def with_mark(image: Image.Image, color: tuple[int, int, int], part: float = 0.12) -> Image.Image:
    """A square of a part of the width in an empty corner."""
    side = round(part * image.width)
    marked = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    marked.paste((*color, 255), (0, 0, side, side))
    return marked


def ring(radius: float) -> Image.Image:
    """A thin grey circle on white."""
    image = Image.new("L", (800, 800), 255)
    ImageDraw.Draw(image).ellipse(
        (400 - radius, 400 - radius, 400 + radius, 400 + radius), outline=150, width=8
    )
    return image.resize((200, 200), Image.Resampling.BOX)


_Table = dict[str, tuple[Callable[[], bytes], Callable[[], bytes]]]

COPIES: _Table = {
    "a drawing at 0.7, JPEG 70": (
        lambda: resave(draw_clipart(1)),
        lambda: resave(draw_clipart(1), "JPEG", 0.7, quality=70),
    ),
    "a transparent drawing at 0.7, JPEG 70": (
        lambda: as_file(draw_clipart(2)),
        lambda: resave(draw_clipart(2), "JPEG", 0.7, quality=70),
    ),
    "a transparent palette, WebP at half": (
        lambda: as_file(draw_clipart(3).quantize(64)),
        lambda: resave(draw_clipart(3), "WEBP", 0.5, quality=75),
    ),
    "transparent WebP": (
        lambda: as_file(draw_clipart(4)),
        lambda: as_file(draw_clipart(4), "WEBP"),
    ),
    "an icon of 64 pixels at 0.7, JPEG 70": (
        lambda: as_file(draw_clipart(5, 64)),
        lambda: resave(draw_clipart(5, 64), "JPEG", 0.7, quality=70),
    ),
    "an icon of 48 pixels at 0.7, JPEG 70": (
        lambda: as_file(draw_clipart(6, 48)),
        lambda: resave(draw_clipart(6, 48), "JPEG", 0.7, quality=70),
    ),
    "an icon of 48 pixels, JPEG 60": (
        lambda: as_file(draw_clipart(7, 48)),
        lambda: resave(draw_clipart(7, 48), "JPEG", quality=60),
    ),
    "an icon of 10 pixels, twice the size": (
        lambda: as_file(draw_clipart(8, 10)),
        lambda: resave(draw_clipart(8, 10), "PNG", 2),
    ),
    "grey of 16 bits, JPEG of 8": (
        lambda: as_file(grey16(1)),
        lambda: as_file(Image.fromarray((np.asarray(grey16(1)) >> 8).astype(np.uint8)), "JPEG"),
    ),
    "one color, another size": (
        lambda: as_file(Image.new("RGB", (200, 100), (200, 200, 200))),
        lambda: as_file(Image.new("RGB", (50, 70), (200, 200, 200)), "JPEG"),
    ),
    "a thin line, JPEG 70": (
        lambda: as_file(ring(300)),
        lambda: resave(ring(300), "JPEG", 0.7, quality=70),
    ),
}

LOOK_ALIKES: _Table = {
    "other shapes": (lambda: as_file(draw_clipart(1)), lambda: as_file(draw_clipart(2))),
    "other colors": (
        lambda: as_file(draw_clipart(1)),
        lambda: as_file(draw_clipart(1, colors="BRG")),
    ),
    "other colors of the same luma": (
        lambda: resave(with_mark(draw_clipart(1), (200, 80, 80), 0.2)),
        lambda: resave(with_mark(draw_clipart(1), (80, 134, 120), 0.2)),
    ),
    "mirrored": (
        lambda: as_file(draw_clipart(1)),
        lambda: as_file(draw_clipart(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ),
    "a mark more": (
        lambda: as_file(draw_clipart(1)),
        lambda: as_file(with_mark(draw_clipart(1), (180, 180, 180), 0.08)),
    ),
    "a faint mark more": (
        lambda: as_file(draw_clipart(1)),
        lambda: as_file(with_mark(draw_clipart(1), (244, 244, 244))),
    ),
    "a mark more on an icon of 48 pixels": (
        lambda: as_file(draw_clipart(1, 48)),
        lambda: as_file(with_mark(draw_clipart(1, 48), (200, 200, 200))),
    ),
    "a larger ring": (lambda: as_file(ring(300)), lambda: as_file(ring(330))),
    "other icons of 10 pixels": (
        lambda: as_file(draw_clipart(1, 10)),
        lambda: as_file(draw_clipart(2, 10)),
    ),
    "other grey of 16 bits": (lambda: as_file(grey16(1)), lambda: as_file(grey16(2))),
    "one color and a little lighter": (
        lambda: as_file(Image.new("RGB", (100, 100), (200, 200, 200))),
        lambda: as_file(Image.new("RGB", (100, 100), (202, 202, 202))),
    ),
    "all transparent and black": (
        lambda: as_file(Image.new("RGBA", (100, 100), (0, 0, 0, 0))),
        lambda: as_file(Image.new("RGB", (100, 100), (0, 0, 0))),
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(name: str) -> None:
    first, second = COPIES[name]
    others = [as_file(draw_clipart(seed, 96)) for seed in range(20, 25)]
    assert places(find([first(), *others, second()])) == [[0, 6]]


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_not_copies(name: str) -> None:
    first, second = LOOK_ALIKES[name]
    assert find([first(), second()]).groups == ()


def test_pictures_that_differ_in_one_place_are_no_copies() -> None:
    """As two clocks do, or the same person with and without a hat."""
    first = Image.open(io.BytesIO(draw_shape("circle", 1, "PNG")))
    second = first.copy()
    second.paste((255, 255, 255), (20, 20, 32, 32))
    images = []
    for image in (first, second):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images.append(buffer.getvalue())
    assert find(images).groups == ()


def test_foggy_pictures_are_alike_and_no_copies() -> None:
    generator = np.random.default_rng(0)
    images = []
    for _ in range(20):
        buffer = io.BytesIO()
        coarse = Image.fromarray(generator.integers(180, 220, (16, 16, 3), np.uint8))
        coarse.resize((160, 160), Image.Resampling.BICUBIC).save(buffer, "PNG")
        images.append(buffer.getvalue())
    assert places(find([*images, encode(images[4], "PNG", 2)])) == [[4, 20]]


def test_exact_copies_are_told_from_near_ones() -> None:
    circle = draw_shape("circle", 1, "PNG")
    found = find(
        [circle, draw_shape("square", 1), circle, encode(circle, "JPEG", quality=85)], num_val=2
    )
    (group,) = found.groups
    assert places(found) == [[0, 2, 3]]
    assert found.is_exact(group[0], group[1])
    assert found.similarity(group[0], group[1]) == 1
    assert not found.is_exact(group[0], group[2])


def test_what_cannot_be_read_is_in_no_group(tmp_path: Path) -> None:
    splits = splits_of([b"", b"", b"text", b"text", draw_shape("circle", 1)])
    gone = Sample("gone", 0, tmp_path / "gone.jpg")
    assert find_duplicates(Splits(("a",), (*splits.train, gone), ()), num_workers=2).groups == ()
    assert find([]).groups == ()


def test_every_image_is_decoded_once_in_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [draw_shape(shape, seed) for shape in ("circle", "square") for seed in range(5)]
    splits = splits_of([*images, images[2]])
    decoded: list[bytes] = []
    compute = duplicates.compute_signature

    def count(data: bytes) -> Any:
        decoded.append(data)
        return compute(data)

    monkeypatch.setattr(duplicates, "compute_signature", count)
    for _ in range(2):
        with open_grids(tmp_path) as cache:
            assert places(find_duplicates(splits, num_workers=2, cache=cache)) == [[2, 10]]
    assert sorted(decoded) == sorted([*images, images[2]])


@pytest.mark.parametrize("block_bytes", [1, 40_000, 64_000_000])
def test_blocks_of_any_size_find_the_same(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [draw_shape("circle", index, size=(64, 64)) for index in range(100)]
    monkeypatch.setattr(duplicates, "_BLOCK_BYTES", block_bytes)
    assert places(find(images * 2, num_val=100)) == [[index, index + 100] for index in range(100)]


def test_the_tree_loses_no_near_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MAX_LEAF", 5)
    generator = np.random.default_rng(0)
    smooth = generator.normal(120, 30, (300, 8, 1)) + generator.normal(0, 4, (300, 8, 8))
    luma = np.clip(smooth, 0, 255).astype(np.uint8).reshape(300, 64)
    luma[150:] = np.clip(luma[:150] + generator.normal(0, 7.5, (150, 64)), 0, 255)
    square = np.square(luma[:, None].astype(float) - luma).mean(axis=2)
    near = {(a, b) for a, b in np.argwhere(square <= 64).tolist() if a < b}
    found = {tuple(sorted(pair)) for pair in duplicates._near_pairs(luma)}
    assert 50 < len(near) < 300
    assert found == near


def test_a_crowd_of_the_same_image_is_one_group() -> None:
    """Half a million pairs, of which each image keeps a few."""
    crowd = [draw_shape("circle", 1, size=(64, 64))] * 1000
    others = [draw_shape("cross", index, size=(64, 64)) for index in range(50)]
    assert places(find(crowd + others)) == [list(range(1000))]


def test_memory_grows_with_the_images_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(data: bytes) -> Signature:
        grid = np.random.default_rng(int(data)).integers(0, 256, (16, 16, 3), np.uint8)
        return Signature(data, (200, 200), grid)

    monkeypatch.setattr(duplicates, "_BLOCK_BYTES", 1_000_000)
    monkeypatch.setattr(duplicates, "compute_signature", compute)
    peaks = []
    for num_images in (1_000, 4_000):
        splits = splits_of([str(index).encode() for index in range(num_images)])
        tracemalloc.start()
        find_duplicates(splits, num_workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 4_000**2  # a byte a pair
