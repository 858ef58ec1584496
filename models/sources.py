"""Sources of labelled images: a folder, a CSV, a torchvision data set, or the embedded digits.

In `models`, so that what reads images outside of a run can use them.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib.util
import inspect
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from models.errors import GraftError, describe_error, join_first

logger = logging.getLogger("graft.sources")

SplitName = Literal["train", "val", "test"]
_SPLIT_FOLDERS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# Stands between the names in the column `labels` of a CSV.
SEPARATOR = "|"
# Files that operating systems leave in folders.
_SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class TorchvisionImage:
    """One image of a torchvision data set, encoded as PNG when it is read."""

    dataset: Any
    index: int

    def read_bytes(self) -> bytes:
        image = self.dataset[self.index][0]
        return _encode(
            image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        )


@dataclass(frozen=True)
class EncodedImage:
    """An image already encoded, in memory."""

    data: bytes

    def read_bytes(self) -> bytes:
        return self.data


# (key, label name, image) of each image; with any number of labels, a tuple of names.
Labelled = list[tuple[str, str | tuple[str, ...], Path | EncodedImage | TorchvisionImage]]
# The split of each image, where the source has splits.
FixedSplits = list[SplitName] | None


def identify_source(data: str, data_root: Path) -> str:
    """The absolute path of `--data`, or what it names with the folder that keeps its files."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else f"{data} {data_root.resolve()}"


def read_source(data: str, data_root: Path) -> tuple[Labelled, FixedSplits]:
    """Read the labels of what `--data` names; the images are read later.

    Raises GraftError where it is not there or cannot be read.
    """
    if data == "digits":
        return _load_digits(), None
    if data.startswith("torchvision:"):
        return _load_torchvision(data.partition(":")[2], data_root)
    path = Path(data).expanduser()
    try:
        if not path.exists():
            raise GraftError(
                f"--data {data}: there is no such file or folder; "
                "or say digits, or torchvision:NAME"
            )
        return _load_csv(path) if path.is_file() else _load_folder(path)
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f": {error.filename}"
        raise GraftError(
            f"--data {data[:80]}: it cannot be read: {error.strerror}{where}"
        ) from error


def _load_digits() -> Labelled:
    # scikit-learn ships the images as a CSV. It is not imported, which takes a second or two.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise GraftError("--data digits: scikit-learn, which ships the images, is not installed")
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    # Strokes touch the border of the 8x8; with a frame of one pixel they stay inside the centre
    # crop: accuracy 0.974 instead of 0.946.
    images = (Image.fromarray(np.pad(row[:64].reshape(8, 8) * 15, 1)) for row in rows)
    return [
        (f"digits/{index:04d}.png", str(row[64]), EncodedImage(_encode(image)))
        for index, (row, image) in enumerate(zip(rows, images, strict=True))
    ]


def _load_folder(root: Path) -> tuple[Labelled, FixedSplits]:
    folders = [
        path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")
    ]
    split_folders = {
        path: _SPLIT_FOLDERS[path.name.lower()]
        for path in folders
        if path.name.lower() in _SPLIT_FOLDERS
    }
    if "train" not in split_folders.values():
        return _load_class_folders(root, folders), None
    labelled: Labelled = []
    splits: list[SplitName] = []
    for folder, split in split_folders.items():
        classes = [
            path
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        ]
        found = _load_class_folders(folder, classes)
        labelled += found
        splits += [split] * len(found)
    return labelled, splits


def _load_class_folders(root: Path, folders: list[Path]) -> Labelled:
    if not folders:
        raise GraftError(
            f"--data {root}: no class folders in it; put the images of each class in a folder "
            "named after the class (photos/cat/1.jpg, photos/dog/2.jpg), or in train/ and val/ "
            "with class folders each"
        )
    for folder in folders:
        if not folder.name.isprintable() or any(
            "\ud800" <= char <= "\udfff" for char in folder.name
        ):
            raise GraftError(
                f"--data {root}: the class folder {folder.name!r} has a name that is no printable "
                "text; rename it"
            )
    images = {folder: _image_files(folder) for folder in folders}
    if empty := [folder.name for folder, paths in images.items() if not paths]:
        logger.warning(
            "--data %s: no file in the class folders %s; they are left out",
            root,
            join_first(empty, 10),
        )
    return [(str(path), folder.name, path) for folder, paths in images.items() for path in paths]


def _image_files(folder: Path) -> list[Path]:
    """Every file below a class folder: its content decides later whether it is an image."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in _SYSTEM_FILES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _load_csv(path: Path) -> tuple[Labelled, FixedSplits]:
    columns, rows = _read_rows(path)
    _check_columns(path, columns)
    labelled: Labelled = []
    splits: list[SplitName] = []
    for number, row in rows:
        _check_row(path, number, row, columns)
        label = (
            _parse_label_names(row["labels"] or "") if "labels" in columns else row["label"].strip()
        )
        labelled.append((row["path"], label, path.parent / row["path"]))
        if "split" in columns:
            splits.append(_read_split(path, number, row["split"]))
    return labelled, splits if "split" in columns else None


def _read_rows(path: Path) -> tuple[Sequence[str], list[tuple[int, dict[Any, Any]]]]:
    """The columns, and the rows with their line numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            # The reader counts blank lines, and line breaks in quotes.
            rows = [(reader.line_num, row) for row in reader]
            return reader.fieldnames or (), rows
    except csv.Error as error:
        raise GraftError(f"--data {path}: not a CSV that can be read: {error}") from error
    except UnicodeDecodeError as error:
        is_utf16 = path.read_bytes()[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "text in UTF-16" if is_utf16 else "not text in UTF-8"
        raise GraftError(
            f"--data {path}: it is {encoding}; save it as CSV in UTF-8, separated by commas"
        ) from error


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if {"label", "labels"} <= set(columns):
        raise GraftError(
            f"--data {path}: it has both label and labels; keep label for one an image, "
            "or labels for any number of them"
        )
    if "path" not in columns or not {"label", "labels"} & set(columns):
        raise GraftError(
            f"--data {path}: it needs the columns path,label and perhaps split; "
            f"it has {_describe_columns(columns)} (where images have several labels, path,labels, "
            f"with {SEPARATOR} between their names)"
        )
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise GraftError(f"--data {path}: it has the column {twice[0]} more than once; keep one")


def _check_row(path: Path, number: int, row: dict[Any, Any], columns: Sequence[str]) -> None:
    line = f"--data {path}: line {number} has"
    if any(row.get(None) or ()):
        raise GraftError(
            f"{line} {len(columns) + len(row[None])} cells, the first line {len(columns)}; "
            'put a path or label with a comma in it into "quotes"'
        )
    if "\0" in (row["path"] or ""):
        raise GraftError(f"{line} a path with a NUL in it, which no file has")
    if not row["path"]:
        raise GraftError(f"{line} no path")
    if "label" in columns and not (row["label"] or "").strip():
        raise GraftError(f"{line} no label")


def _read_split(path: Path, number: int, name: str | None) -> SplitName:
    split = _SPLIT_FOLDERS.get((name or "").lower())
    if split is None:
        raise GraftError(
            f"--data {path}: line {number} has the split {name!r}; allowed are train, val and test"
        )
    return split


def _parse_label_names(text: str) -> tuple[str, ...]:
    """Each name once, in order; an empty text has none."""
    return tuple(sorted({name.strip() for name in text.split(SEPARATOR)} - {""}))


def _describe_columns(columns: Sequence[str]) -> str:
    """The columns of a CSV that lacks some, with the way out where the cause can be seen."""
    if len(columns) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs")):
            if separator in columns[0]:
                return f"{columns[0]!r}, separated by {name}; save it separated by commas"
    lowered = {column.strip().lower() for column in columns}
    if "path" in lowered and lowered & {"label", "labels"}:
        names = ", ".join(map(repr, columns))
        return f"{names}; write them in small letters, without spaces around them"
    return ", ".join(columns) or "none"


def _load_torchvision(name: str, root: Path) -> tuple[Labelled, FixedSplits]:
    # Imported here: it imports torch, which other sources do not need.
    import torchvision

    factory = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(factory) or not issubclass(factory, torchvision.datasets.VisionDataset):
        raise GraftError(
            f"--data torchvision:{name}: torchvision has no such data set; "
            "for example FashionMNIST, OxfordIIITPet, Flowers102, Food101"
        )
    labelled: Labelled = []
    splits: list[SplitName] = []
    arguments_of = _torchvision_splits(factory)
    for split, arguments in arguments_of.items():
        dataset = _open_torchvision(factory, name, root, arguments)
        if dataset is None:
            continue
        names = getattr(dataset, "classes", None)
        for index, label in enumerate(_torchvision_labels(dataset)):
            label_name = str(names[label]) if names is not None else str(label)
            key = f"torchvision:{name}/{split}/{index}"
            labelled.append((key, label_name, TorchvisionImage(dataset, index)))
            splits.append(split)
    return labelled, splits if len(arguments_of) > 1 else None


def _torchvision_splits(factory: Any) -> dict[SplitName, dict[str, Any]]:
    """The arguments that give each split of a data set."""
    parameters = inspect.signature(factory).parameters
    if "train" in parameters:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" in parameters:
        train = "trainval" if parameters["split"].default == "trainval" else "train"
        return {"train": {"split": train}, "val": {"split": "val"}, "test": {"split": "test"}}
    return {"train": {}}


def _open_torchvision(factory: Any, name: str, root: Path, arguments: dict[str, Any]) -> Any | None:
    """The data set from disk, else downloaded; None where it has no such split."""
    try:
        return factory(root=str(root), download=False, **arguments)
    except ValueError:
        return None
    except (RuntimeError, FileNotFoundError):
        logger.info("torchvision:%s is not under %s: downloading it", name, root)
    try:
        return factory(root=str(root), download=True, **arguments)
    except (OSError, RuntimeError) as error:
        reason = " ".join(describe_error(error).split())
        raise GraftError(
            f"--data torchvision:{name}: it is not under --data-root {root} and could not be "
            f"downloaded ({reason}); run it once where there is a network, "
            "and copy that folder here"
        ) from error


def _torchvision_labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            return [int(label) for label in labels]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
