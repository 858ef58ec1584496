"""Images that the tests draw: shapes on noisy ground, easy for a pretrained backbone and hard for chance."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square")


def draw_shape(
    shape: str, seed: int, kind: str = "JPEG", size: tuple[int, int] = (200, 160)
) -> bytes:
    """One shape at a random place, size and colour on a noisy ground, encoded as `kind`."""
    generator = np.random.default_rng((SHAPES.index(shape), seed))
    width, height = size
    image = Image.fromarray(generator.integers(0, 70, (height, width, 3), np.uint8))
    draw = ImageDraw.Draw(image)
    radius = int(generator.integers(height // 5, height // 3))
    x = int(generator.integers(width // 2 - 15, width // 2 + 15))
    y = int(generator.integers(height // 2 - 10, height // 2 + 10))
    color = tuple(int(value) for value in generator.integers(140, 256, 3))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.line((x - radius, y, x + radius, y), fill=color, width=radius // 2)
        draw.line((x, y - radius, x, y + radius), fill=color, width=radius // 2)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_class_folders(
    root: Path, num_per_class: int, first_seed: int = 0, kind: str = "JPEG"
) -> Path:
    """`root/<shape>/<n>.<ext>` for every shape."""
    for shape in SHAPES:
        folder = root / shape
        folder.mkdir(parents=True)
        for seed in range(first_seed, first_seed + num_per_class):
            (folder / f"{seed}.{kind.lower()}").write_bytes(draw_shape(shape, seed, kind))
    return root
