"""Plant known faults in a copy of real images, for an audit to find.

20 exact duplicates (half of them across the split), 20 near duplicates across the split (re-encoded
or resized), 5 % flipped labels in train, 10 broken files, one class missing in val.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.splits import Sample, Splits

NUM_COPIES = 20
NUM_BROKEN = 10
FLIPPED_FRACTION = 0.05


@dataclass(frozen=True)
class Faults:
    """The faults in `folder`, which has train/ and val/; copies are copy → original."""

    folder: Path
    exact: dict[Path, Path]
    near: dict[Path, Path]
    flipped: frozenset[Path]
    broken: frozenset[Path]
    missing: str


def plant_faults(splits: Splits, folder: Path, *, seed: int = 0) -> Faults:
    """Write train and val as class folders to `folder`, with faults in different images."""
    generator = np.random.default_rng(seed)
    names = splits.label_names
    missing = names[-1]
    order = [splits.train[index] for index in generator.permutation(len(splits.train))]
    num_flipped = round(len(order) * FLIPPED_FRACTION)
    flipped_samples, others = order[:num_flipped], order[num_flipped:]
    paths: dict[int, Path] = {}
    flipped: set[Path] = set()
    for number, (side, sample) in enumerate(
        [
            *(("train", sample) for sample in splits.train),
            *(("val", sample) for sample in splits.val),
        ]
    ):
        label = splits.describe(sample)
        is_flipped = any(sample is other for other in flipped_samples)
        if side == "val" and label == missing:
            continue
        if is_flipped:
            label = str(generator.choice([name for name in names if name != label]))
        paths[id(sample)] = _write(folder / side / label / f"{number:05d}.png", sample.read())
        if is_flipped:
            flipped.add(paths[id(sample)])
    sources: Iterator[Sample] = iter(
        sample for sample in others if splits.describe(sample) != missing
    )
    exact, near, broken = {}, {}, set()
    for number in range(NUM_COPIES):
        sample = next(sources)
        side = "val" if number % 2 else "train"
        exact[
            _write(
                folder / side / splits.describe(sample) / f"copy-{number:02d}.png", sample.read()
            )
        ] = paths[id(sample)]
    for number in range(NUM_COPIES):
        sample = next(sources)
        image = Image.open(io.BytesIO(sample.read())).convert("RGB")
        changes = _FOR_TINY if min(image.size) < 16 else (*_ENCODED, *_RESIZED)
        change, suffix = changes[number % len(changes)]
        data = change(image)
        near[
            _write(folder / "val" / splits.describe(sample) / f"near-{number:02d}{suffix}", data)
        ] = paths[id(sample)]
    for number in range(NUM_BROKEN):
        sample = next(sources)
        side = "val" if number % 2 else "train"
        broken.add(
            _write(
                folder / side / splits.describe(sample) / f"broken-{number}.jpg",
                _break(sample.read(), number),
            )
        )
    return Faults(folder, exact, near, frozenset(flipped), frozenset(broken), missing)


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _resize(image: Image.Image, factor: float) -> bytes:
    return _encode(
        image.resize(
            (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
        ),
        "PNG",
    )


_Change = tuple[Callable[[Image.Image], bytes], str]
_ENCODED: tuple[_Change, ...] = (
    (lambda image: _encode(image, "JPEG", quality=60), ".jpg"),
    (lambda image: _encode(image, "JPEG", quality=85), ".jpg"),
    (lambda image: _encode(image, "WEBP", quality=75), ".webp"),
)
_RESIZED: tuple[_Change, ...] = (
    (lambda image: _resize(image, 0.6), ".png"),
    (lambda image: _resize(image, 0.8), ".png"),
    (lambda image: _resize(image, 2.0), ".png"),
)
# What is left of a few pixels after less than that is another picture.
_FOR_TINY: tuple[_Change, ...] = (*_ENCODED[1:], *_RESIZED[2:])


def _break(data: bytes, number: int) -> bytes:
    """Empty, cut short, another kind of file, and noise behind a good beginning."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    jpeg = _encode(image, "JPEG", quality=90)
    return (
        b"",
        jpeg[: len(jpeg) * 2 // 3],
        data[: len(data) // 2],
        b"<html><body>404 Not Found</body></html>",
        data[:40] + bytes(range(256)) * 4,
    )[number % 5]


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
