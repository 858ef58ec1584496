"""The images that the tests draw: shapes, colours and noise."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square")
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
LABELS = tuple(COLORS)
NOISE_SIZE = 32


def draw_shape(
    shape: str, seed: int, kind: str = "JPEG", size: tuple[int, int] = (200, 160)
) -> bytes:
    """One shape at a random place, size and colour on noise: easy for a pretrained backbone."""
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
    return _encode(image, kind)


def draw_image(
    label: str, seed: int = 0, size: tuple[int, int] = (320, 240), kind: str = "JPEG"
) -> bytes:
    """One of COLORS in an 8x8 pattern drawn from the seed, the same at every size."""
    noise = np.random.default_rng(seed).integers(-25, 26, (8, 8, 3))
    pixels = np.clip(np.array(COLORS[label]) + noise, 0, 255).astype(np.uint8)
    return _encode(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), kind)


def draw_clipart(seed: int, size: int = 256, colors: str = "RGB") -> Image.Image:
    """Saturated shapes with black outlines and a thin line on transparency, RGBA; `colors` names
    the order of the channels, as in "BGR"."""
    generator = np.random.default_rng((7, seed))
    large = Image.new("RGBA", (4 * size, 4 * size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(large)
    palette = ((230, 20, 20), (20, 60, 220), (250, 210, 20), (20, 150, 60))
    for number in range(4):
        x, y = generator.uniform(0.2, 0.8, 2) * 4 * size
        radius = generator.uniform(0.1, 0.2) * 4 * size
        color = tuple(palette[number]["RGB".index(channel)] for channel in colors)
        box = (x - radius, y - radius, x + radius, y + radius)
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape(box, fill=color, outline=(0, 0, 0), width=size // 16)
    ends = tuple(generator.uniform(0.1, 0.9, 4) * 4 * size)
    draw.line(ends, fill=(160, 0, 160), width=size // 12)
    return large.resize((size, size), Image.Resampling.BOX)


def draw_noise(label: int, seed: int, brighter: int = 30, size: int = NOISE_SIZE) -> bytes:
    """A PNG of noise in which the colour of the label's number is a little brighter."""
    generator = np.random.default_rng((label, seed))
    pixels = generator.integers(0, 200, (size, size, 3))
    pixels[..., label] += brighter
    return _encode(Image.fromarray(pixels.astype(np.uint8)), "PNG")


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


def write_noise_folders(root: Path, num_per_class: int, brighter: int = 6) -> Path:
    """`root/<label>/<n>.png`; at 6, too much alike for a probe to tell all of them apart."""
    for label, name in enumerate(LABELS):
        (root / name).mkdir(parents=True, exist_ok=True)
        for seed in range(num_per_class):
            (root / name / f"{seed}.png").write_bytes(draw_noise(label, seed, brighter))
    return root


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
