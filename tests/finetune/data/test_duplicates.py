"""Copies are told from similar images, in memory that grows linearly with the number of images."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data import duplicates
from finetune.data.duplicates import Duplicates, Signature, find_duplicates, open_grids
from finetune.data.splits import Sample, Splits
from models.sources import EncodedImage
from tests.support.images import draw_shape


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


def test_a_second_run_decodes_only_what_is_new_or_may_be_a_copy(
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
    assert decoded[-2:] == [images[2], images[2]]
    assert len(decoded) == 11 + 2 + 2


@pytest.mark.parametrize("block_bytes", [1, 40_000, 64_000_000])
def test_blocks_of_any_size_find_the_same(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [draw_shape("circle", index, size=(64, 64)) for index in range(100)]
    monkeypatch.setattr(duplicates, "_BLOCK_BYTES", block_bytes)
    assert places(find(images * 2, num_val=100)) == [[index, index + 100] for index in range(100)]


def test_a_crowd_of_the_same_image_is_one_group() -> None:
    """Half a million pairs, of which each image keeps a few."""
    crowd = [draw_shape("circle", 1, size=(64, 64))] * 1000
    others = [draw_shape("cross", index, size=(64, 64)) for index in range(50)]
    assert places(find(crowd + others)) == [list(range(1000))]


def test_memory_grows_with_the_images_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(data: bytes) -> Signature:
        grid = np.random.default_rng(int(data)).integers(0, 256, (8, 8, 3), np.int16)
        return Signature(data, 200, grid, grid)

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
