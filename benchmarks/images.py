"""The benchmarks' images, made from registries' packages, so that they are the same everywhere.

Folders train/ and val/ of class folders:
fashion-mnist   Debian's dataset-fashion-mnist: 28x28 grey photographs of clothes, 10 classes (MIT)
emoji           Microsoft's Fluent Emoji in 3D, 256x256 in colour (npm @lobehub/fluent-emoji-3d,
                MIT), in Unicode's 9 groups (npm unicode-emoji-json, MIT); one skin tone each, so
                that no picture is in both splits in another shade
stamps          Debian's tuxpaint-stamps-default: photographs and drawings of all sizes and shapes,
                in 8 folders (various free licences)
clip-art        Debian's openclipart-png: drawings of all sizes and shapes, 150 each of the 10
                largest folders (public domain)
photos          500x334 JPEG crops of the two photographs that scikit-learn ships, one class each:
                for speed only, the classes are trivial to tell apart

A folder without classes:
wallpapers      400x300 JPEG tiles of Debian's wallpapers; the packages: benchmarks/duplicates.py

Encoded in memory:
requests        such crops and the whole photographs, 640x427, as clients send them
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.files import move_whole, temporary_folder

_FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
_EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
_EMOJI_GROUPS_PACKAGE = "unicode-emoji-json@0.9.0"
_STAMPS_DIR = Path("usr/share/tuxpaint/stamps")
_CLIP_ART_DIR = Path("usr/share/openclipart/png")
# A few are posters of hundreds of megapixels.
_MAX_CLIP_PIXELS = 10_000_000
_MAX_SIDE = 512
_PHOTO_SIZE = (500, 334)
_WALLPAPER_WIDTH = 2_000
_TILE_SIZE = (400, 300)
_PHOTO_QUALITY = 90

_Bytes = npt.NDArray[np.uint8]


def make_fashion_mnist(data_dir: Path, *, num_train: int, num_val: int) -> Path:
    """The first images of the package's training set, and of its test set as val."""

    def write(folder: Path) -> None:
        for split, stem, count in (("train", "train", num_train), ("val", "t10k", num_val)):
            images, labels = _read_fashion(stem)
            for index in range(count):
                path = folder / split / _FASHION_CLASSES[labels[index]] / f"{index:05d}.png"
                _save(Image.fromarray(images[index]), path)

    return _make(data_dir / f"fashion-mnist-{num_train}-{num_val}", write)


def make_fashion_csvs(data_dir: Path, sizes: Sequence[int]) -> dict[int, Path]:
    """For each size a CSV of that many images of the training set, one in five of them val."""

    def write(folder: Path) -> None:
        images, labels = _read_fashion("train")
        for index in range(max(sizes)):
            _save(Image.fromarray(images[index]), folder / "images" / f"{index:05d}.png")
        for size in sizes:
            with (folder / f"growth-{size}.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(("path", "label", "split"))
                for index in range(size):
                    rows.writerow(
                        (
                            f"images/{index:05d}.png",
                            _FASHION_CLASSES[labels[index]],
                            "train" if index % 5 else "val",
                        )
                    )

    folder = _make(data_dir / f"fashion-mnist-growth-{'-'.join(map(str, sizes))}", write)
    return {size: folder / f"growth-{size}.csv" for size in sizes}


def make_emoji(data_dir: Path, *, limit: int | None = None) -> Path:
    """The emoji in both packages, or about `limit` of them; one in five of each group is val.

    They are ordered by a hash of their names.
    """

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            pictures = _unpack(_EMOJI_PACKAGE, Path(scratch) / "pictures") / "assets"
            groups = _unpack(_EMOJI_GROUPS_PACKAGE, Path(scratch) / "groups")
            known = json.loads((groups / "data-by-emoji.json").read_text())
            members: dict[str, list[Path]] = {}
            for emoji, described in known.items():
                path = pictures / f"{_code_points(emoji)}.webp"
                if path.is_file():
                    members.setdefault(described["group"].lower().replace(" & ", "-"), []).append(
                        path
                    )
            step = 1 if limit is None else -(-sum(map(len, members.values())) // limit)
            for group, paths in members.items():
                shuffled = sorted(
                    paths, key=lambda path: hashlib.sha256(path.stem.encode()).digest()
                )[::step]
                for index, path in enumerate(shuffled):
                    _save(
                        _on_white(Image.open(path)),
                        folder / ("train" if index % 5 else "val") / group / f"{path.stem}.png",
                    )

    return _make(data_dir / ("emoji" if limit is None else f"emoji-{limit}"), write)


def make_stamps(data_dir: Path, root: Path) -> Path:
    """The stamps below `root` in folders of 30 or more; one in five of each is val."""
    return _make_from_folders(data_dir / "stamps", root / _STAMPS_DIR, min_images=30)


def make_clip_art(data_dir: Path, root: Path) -> Path:
    """150 pictures below `root` from each of the 10 largest folders; one in five is val."""
    return _make_from_folders(
        data_dir / "clip-art", root / _CLIP_ART_DIR, max_images=150, max_folders=10
    )


def _make_from_folders(
    folder: Path,
    source: Path,
    *,
    min_images: int = 1,
    max_images: int | None = None,
    max_folders: int | None = None,
) -> Path:
    """PNG pictures of a package's folders, without transparency, of at most 512 pixels a side.

    They are ordered by a hash of their names.

    A picture that is there twice under two names is taken once.
    """

    def write(target: Path) -> None:
        if not source.is_dir():
            raise RuntimeError(
                f"{source} is not there; benchmarks/images.py says which package has it"
            )
        members: dict[str, list[Path]] = {}
        seen: set[bytes] = set()
        for path in sorted(source.rglob("*.png")):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in seen and _count_pixels(path) <= _MAX_CLIP_PIXELS:
                seen.add(digest)
                members.setdefault(path.relative_to(source).parts[0], []).append(path)
        named = members.keys() - {"special", "unsorted"}
        largest = sorted(named, key=lambda name: (-len(members[name]), name))[:max_folders]
        for name in largest:
            paths = members[name]
            if len(paths) < min_images:
                continue
            paths.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
            for index, path in enumerate(paths[:max_images]):
                split = "train" if index % 5 else "val"
                with Image.open(path) as opened:
                    picture = _on_white(opened)
                picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
                _save(picture, target / split / name / f"{index:04d}.png")

    return _make(folder, write)


def _count_pixels(path: Path) -> int:
    """From the header, for Pillow refuses to open the largest."""
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
    return width * height


def make_wallpaper_tiles(data_dir: Path, root: Path) -> Path:
    """All wallpapers below `root`, each once, cut into tiles that do not overlap."""

    def write(folder: Path) -> None:
        largest: dict[Path, Path] = {}
        for share in ("wallpapers", "backgrounds"):
            for path in sorted((root / "usr/share" / share).rglob("*")):
                if path.suffix in (".jpg", ".png") and not path.is_symlink():
                    # KDE's have a folder of one picture in several sizes.
                    picture = path.parent if path.parent.name.startswith("images") else path
                    before = largest.get(picture, path)
                    largest[picture] = max(before, path, key=lambda each: each.stat().st_size)
        for number, path in enumerate(largest.values()):
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            image.thumbnail((_WALLPAPER_WIDTH, image.height), Image.Resampling.LANCZOS)
            width, height = _TILE_SIZE
            for top in range(0, image.height - height + 1, height):
                for left in range(0, image.width - width + 1, width):
                    tile = image.crop((left, top, left + width, top + height))
                    _save(tile, folder / f"{number:03d}-{top}-{left}.jpg")

    return _make(data_dir / "wallpapers", write)


def make_photos(data_dir: Path, *, count: int) -> Path:
    """`count` different crops of scikit-learn's photographs, some mirrored; one in five is val."""

    def write(folder: Path) -> None:
        source = _sklearn_photo_dir()
        photos = {name: Image.open(source / f"{name}.jpg") for name in ("china", "flower")}
        windows = [
            (name, left, top, mirror)
            for name, photo in photos.items()
            for left in range(photo.width - _PHOTO_SIZE[0])
            for top in range(photo.height - _PHOTO_SIZE[1])
            for mirror in (False, True)
        ]
        for index, (name, left, top, mirror) in enumerate(random.Random(0).sample(windows, count)):
            window = photos[name].crop((left, top, left + _PHOTO_SIZE[0], top + _PHOTO_SIZE[1]))
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else window
            _save(window, folder / ("train" if index % 5 else "val") / name / f"{index:05d}.jpg")

    return _make(data_dir / f"photos-{count}", write)


def make_request_images(data_dir: Path, *, count: int) -> list[bytes]:
    """`count` JPEGs, 500 to 640 pixels wide: of every eight, seven crops and a whole photograph."""
    windows = sorted(make_photos(data_dir, count=count).rglob("*.jpg"), key=lambda path: path.name)
    whole = itertools.cycle(
        [
            (_sklearn_photo_dir() / f"{name}.jpg", mirror)
            for mirror in (False, True)
            for name in ("china", "flower")
        ]
    )
    encoded: list[bytes] = []
    for index, path in enumerate(windows):
        encoded.append(path.read_bytes() if index % 8 < 7 else _encode_photo(*next(whole)))
    return encoded


def _encode_photo(path: Path, mirror: bool) -> bytes:
    image = Image.open(path)
    buffer = io.BytesIO()
    (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image).save(
        buffer, "JPEG", quality=_PHOTO_QUALITY
    )
    return buffer.getvalue()


def _make(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, written by `write` unless it is there; whole or not at all."""
    if not folder.is_dir():
        with temporary_folder(folder.parent) as temporary:
            write(temporary)
            move_whole(temporary, folder)
    return folder


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=_PHOTO_QUALITY)


def _read_fashion(stem: str) -> tuple[_Bytes, _Bytes]:
    if not _FASHION_DIR.is_dir():
        raise RuntimeError(f"{_FASHION_DIR} is not there; apt-get install dataset-fashion-mnist")
    return _read_idx(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28), _read_idx(
        f"{stem}-labels-idx1-ubyte.gz", 8
    )


def _read_idx(name: str, num_header_bytes: int) -> _Bytes:
    with gzip.open(_FASHION_DIR / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=num_header_bytes)


def _unpack(package: str, folder: Path) -> Path:
    """An npm package's files, by npm's own client."""
    if shutil.which("npm") is None:
        raise RuntimeError(f"npm, which fetches {package}, is not installed; apt-get install npm")
    folder.mkdir()
    packed = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), package],
        check=True,
        capture_output=True,
        text=True,
    )
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def _code_points(emoji: str) -> str:
    return "-".join(f"{ord(character):04x}" for character in emoji)


def _on_white(image: Image.Image) -> Image.Image:
    """Without transparency, which every loader treats in its own way."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert(
        "RGB"
    )


def _sklearn_photo_dir() -> Path:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise RuntimeError("scikit-learn, which ships the photographs, is not installed")
    return Path(spec.origin).parent / "datasets" / "images"
