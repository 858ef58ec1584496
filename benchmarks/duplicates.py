"""How many copies of pictures finetune/data/duplicates.py finds, and what it takes for copies.

python benchmarks/duplicates.py                 all sets
python benchmarks/duplicates.py --sets stamps   one

apt-get install openclipart-png tuxpaint-stamps-default oxygen-icon-theme dataset-fashion-mnist
plasma-workspace-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers
gnome-backgrounds mate-backgrounds sway-backgrounds; or dpkg -x each into a folder, and
--root FOLDER (not for Fashion-MNIST). npm fetches the emoji.

Left out, as they are no distinct pictures: equal pixels, tiles of one color (a standard deviation
below 6 of 255), and openclipart's stars, one drawing generated with other numbers. Of what is found
among distinct images, those are no false alarms that are the same picture by another measure: at
128x128, less than 0.5 % of the pixels differ by more than 32.

What it should show: at 0.7 of the size as JPEG 70, at least 95 % of the copies of photographs,
drawings, and icons of 48 pixels and more; false alarms at most 0.1 % of the images of each kind.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from benchmarks.images import make_emoji, make_fashion_mnist, make_wallpaper_tiles
from finetune.data.duplicates import find_duplicates, open_grids
from finetune.data.splits import Sample, Splits
from models.images import ImageError, Pixels, open_image
from models.sources import EncodedImage

_ICONS = "usr/share/icons/oxygen/base"
# (root, data_dir) → a folder of images
SETS: dict[str, Callable[[Path, Path], Path]] = {
    "photographs": lambda root, data_dir: make_wallpaper_tiles(data_dir, root),
    "clip art": lambda root, data_dir: root / "usr/share/openclipart/png",
    "stamps": lambda root, data_dir: root / "usr/share/tuxpaint/stamps",
    "emoji": lambda root, data_dir: make_emoji(data_dir),
    "icons 128": lambda root, data_dir: root / _ICONS / "128x128",
    "icons 64": lambda root, data_dir: root / _ICONS / "64x64",
    "icons 48": lambda root, data_dir: root / _ICONS / "48x48",
    "icons 32": lambda root, data_dir: root / _ICONS / "32x32",
    "icons 22": lambda root, data_dir: root / _ICONS / "22x22",
    "clothes 28": lambda root, data_dir: make_fashion_mnist(
        data_dir, num_train=3_000, num_val=1_000
    ),
}
_MAX_SIDE = 900


def _encode(image: Image.Image, kind: str, scale: float = 1, **options: int) -> bytes:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def _crop(image: Image.Image) -> bytes:
    x, y = round(image.width * 0.01), round(image.height * 0.01)
    return _encode(image.crop((x, y, image.width - x, image.height - y)), "PNG")


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "0.7 JPEG 70": lambda image: _encode(image, "JPEG", 0.7, quality=70),
    "JPEG 60": lambda image: _encode(image, "JPEG", quality=60),
    "JPEG 50": lambda image: _encode(image, "JPEG", quality=50),
    "WebP 75": lambda image: _encode(image, "WEBP", quality=75),
    "0.6 PNG": lambda image: _encode(image, "PNG", 0.6),
    "0.5 PNG": lambda image: _encode(image, "PNG", 0.5),
    "0.5 JPEG 70": lambda image: _encode(image, "JPEG", 0.5, quality=70),
    "2x JPEG 75": lambda image: _encode(image, "JPEG", 2, quality=75),
    "2 % cropped": _crop,
    "10 brighter": lambda image: _encode(image.point(lambda value: min(255, value + 10)), "PNG"),
}


def load_distinct(folder: Path, limit: int) -> list[Path]:
    """At most `limit` images, in the order of a hash of their names, without equal pixels."""
    paths = sorted(
        (path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp")),
        key=lambda path: hashlib.sha256(str(path.relative_to(folder)).encode()).digest(),
    )
    kept: list[Path] = []
    seen: set[bytes] = set()
    for path in paths:
        if len(kept) == limit:
            break
        # A theme links one icon to others.
        if path.is_symlink() or "stars" in path.parts:
            continue
        try:
            pixels = _small(path)
        except (OSError, ImageError):
            continue
        digest = hashlib.sha256(pixels.tobytes()).digest()
        is_flat = path.suffix == ".jpg" and pixels.std(axis=(0, 1)).max() < 6
        if digest not in seen and not is_flat:
            kept.append(path)
        seen.add(digest)
    if not kept:
        raise RuntimeError(f"no images in {folder}; see the packages at the top of this file")
    return kept


def _small(path: Path) -> Pixels:
    pixels = open_image(path.read_bytes()).pixels
    return np.asarray(pixels.resize((128, 128), Image.Resampling.BILINEAR))


def is_same_picture(first: Path, second: Path) -> bool:
    """By single pixels, of which a copy changes few by much."""
    difference = np.abs(_small(first).astype(np.int16) - _small(second)).max(axis=2)
    return float((difference > 32).mean()) < 0.005


def measure(paths: Sequence[Path], num_copies: int) -> tuple[dict[str, float], list[list[Path]]]:
    """The share of copies found by kind, and pairs of distinct images that are called copies."""
    originals = [Sample(str(path), 0, path) for path in paths]
    recall = {}
    with tempfile.TemporaryDirectory() as scratch, open_grids(Path(scratch)) as cache:
        groups = find_duplicates(
            Splits(("",), tuple(originals), ()), num_workers=2, cache=cache
        ).groups
        false_alarms = [
            [Path(group[0].key), Path(other.key)]
            for group in groups
            for other in group[1:]
            if not is_same_picture(Path(group[0].key), Path(other.key))
        ]
    with tempfile.TemporaryDirectory() as scratch, open_grids(Path(scratch)) as cache:
        for kind, make_copy in KINDS.items():
            copies = []
            for path in paths[:num_copies]:
                pixels = open_image(path.read_bytes()).pixels
                pixels.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BICUBIC)
                copies.append(Sample(f"copy of {path}", 0, EncodedImage(make_copy(pixels))))
            groups = find_duplicates(
                Splits(("",), tuple(originals[:num_copies]), tuple(copies)),
                num_workers=2,
                cache=cache,
            ).groups
            grouped = [{sample.key for sample in group} for group in groups]
            found = sum(
                any({str(path), f"copy of {path}"} <= group for group in grouped)
                for path in paths[:num_copies]
            )
            recall[kind] = found / len(copies)
    return recall, false_alarms


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--root", type=Path, default=Path("/"), help="where packages are installed")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "graft-benchmark",
        help="where the images are made",
    )
    parser.add_argument("--images", type=int, default=2_000, help="of a set, for false alarms")
    parser.add_argument("--copies", type=int, default=300, help="of each kind")
    args = parser.parse_args()
    print(f"| images | {' | '.join(KINDS)} | false alarms |")
    print("|---" * (len(KINDS) + 2) + "|")
    for name in args.sets:
        paths = load_distinct(SETS[name](args.root, args.data_dir), args.images)
        recall, false_alarms = measure(paths, args.copies)
        cells = [f"{share:.1%}".replace("100.0", "100") for share in recall.values()]
        alarms = f"{len(false_alarms)} ({len(false_alarms) / len(paths):.2%})"
        print(f"| {name}, {len(paths):,} | {' | '.join(cells)} | {alarms} |", flush=True)
        for first, second in false_alarms:
            print(f"{name}: taken for copies: {first} {second}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
