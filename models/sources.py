"""Sources of labelled images: a folder, a CSV, a torchvision data set, or the embedded digits.

In `models`, so that what reads images outside of a run can use them.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import gzip
import importlib.util
import inspect
import io
import logging
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.errors import GraftError, describe_error, first_line, join_first
from models.image_folder import SplitName as SplitName
from models.image_folder import is_printable, read_image_folder, read_split_name

logger = logging.getLogger("graft.sources")

# Stands between the names in the column `labels` of a CSV.
SEPARATOR = "|"
_FILE, _NOTHING = "a file", "nothing"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# All that is read of a CSV.
_COLUMNS = ("path", "label", "labels", "split")
# Names, without case and punctuation, of columns that usually say which split an image is of.
_SPLIT_COLUMNS = re.compile(
    r"(sub|image)?sets?|(cv|k)?folds?|partitions?|phases?|splits?|usage"
    r"|(is|in)?(train|val|valid|test)(ing|idation)?|(data|dataset|set)(split|type)"
)
_EXPORT = "write its images to class folders, or list them in a CSV with path,label"
# First bytes of files that are neither a folder nor a CSV, and what they are.
_MAGIC = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it, and name the folder",
    b"Rar!": "a rar archive; unpack it, and name the folder",
    b"\x1f\x8b": "a gzip file; unpack it, and name the folder or the CSV",
    b"BZh": "a bzip2 file; unpack it, and name the folder or the CSV",
    b"\xfd7zXZ": "an xz file; unpack it, and name the folder or the CSV",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it, and name the folder or the CSV",
    b"PAR1": "a Parquet file; write its images to files, and list them in a CSV",
    b"\x89HDF": "an HDF5 file; write its images to files, and list them in a CSV",
    b"\x93NUMPY": "a NumPy file; write its images to files, and list them in a CSV",
    b"\xff\xd8\xff": "a single image; name the folder of class folders",
    b"\x89PNG": "a single image; name the folder of class folders",
    b"GIF8": "a single image; name the folder of class folders",
}


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


@dataclass(frozen=True)
class Source:
    """Labelled images, their splits where the source has some, and what one should know of it.

    `notes` say what was left out, or cannot be read, and why; `closed` names the folders that could
    not be read, whose images nobody has counted.
    """

    labelled: Labelled
    splits: FixedSplits = None
    notes: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def check_source_exists(data: str) -> None:
    """Raise GraftError where `--data` is neither a path that exists nor another source's name."""
    if data == "digits" or data.startswith("torchvision:"):
        return
    # What the system refuses, such as a name that is too long, is said where it is read.
    with contextlib.suppress(OSError):
        if not Path(data).expanduser().exists():
            raise _missing(data)


def read_source(data: str, data_root: Path) -> Source:
    """Read the labels of what `--data` names; the images are read later.

    A path that exists goes before the names of other sources. Raises GraftError where it is not
    there, cannot be read, or can be read in two ways.
    """
    path = Path(data).expanduser()
    try:
        if path.exists():
            return _load_path(data, path)
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f": {error.filename}"
        raise GraftError(
            f"--data {data[:80]}: it cannot be read: {error.strerror}{where}"
        ) from error
    if data == "digits":
        return Source(_load_digits())
    if data.startswith("torchvision:"):
        return _load_torchvision(data.partition(":")[2], data_root)
    raise _missing(data)


def _load_path(data: str, path: Path) -> Source:
    if path.is_dir():
        source = _load_folder(path)
    elif path.is_file():
        _refuse_other_files(path)
        source = _load_csv(path)
    else:
        raise GraftError(
            f"--data {data}: it is {_kind_of(path)}, which can be read only once; write it to a "
            "CSV file, and name that"
        )
    if data != "digits":
        return source
    note = f"this is {path.resolve()}; the embedded digits are read where no such path exists"
    return replace(source, notes=(*source.notes, note))


def _refuse_other_files(path: Path) -> None:
    """Raise GraftError for archives, images and other files that are no CSV."""
    with path.open("rb") as file:
        start = file.read(16)
    found = next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)
    if zipfile.is_zipfile(path):
        found = "a zip archive; unpack it, and name the folder"
    elif found is None and start and tarfile.is_tarfile(path):
        found = "a tar archive; unpack it, and name the folder"
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        found = "a single image; name the folder of class folders"
    if found is not None:
        raise GraftError(f"--data {path}: it is {found}")


def _missing(data: str) -> GraftError:
    return GraftError(f"--data {data}: {_explain_missing(data, Path(data).expanduser())}")


def _explain_missing(data: str, path: Path) -> str:
    if _URL.match(data):
        return (
            "it is a URL, and Graft downloads no images from it; download them, and name the "
            "folder or the CSV"
        )
    if data == "-":
        return "images are not read from standard input; name a folder or a CSV file"
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, where nothing is; mend the link"
    if re.search(r"[*?\[]", data):
        return "there is no such file or folder, and * and ? are not expanded; name one folder"
    return "there is no such file or folder; or say digits, or torchvision:NAME"


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


def _load_folder(root: Path) -> Source:
    found = read_image_folder(root)
    labelled: Labelled = [(str(path), name, path) for name, path in found.images]
    unread = found.unread
    return Source(labelled, found.splits, unread.describe(root), unread.describe_closed(root))


def _load_csv(path: Path) -> Source:
    columns, rows = _read_rows(path)
    _check_columns(path, columns)
    if "labels" in columns:
        _check_separator(path, rows)
    labelled: Labelled = []
    splits: list[SplitName] = []
    for number, row in rows:
        _check_row(path, number, row, columns)
        name = _choose_path(path.parent, row["path"])
        label = (
            _parse_label_names(row["labels"] or "") if "labels" in columns else row["label"].strip()
        )
        labelled.append((name, label, path.parent / name))
        if "split" in columns:
            splits.append(_read_split(path, number, row["split"]))
    notes = (
        *_check_unused_columns(path, columns, rows),
        *_check_paths(path, labelled),
        *_find_repeats(labelled),
        *_find_joined_labels(labelled),
    )
    return Source(labelled, splits if "split" in columns else None, notes)


def _choose_path(folder: Path, text: str) -> str:
    """A path without spaces around it, which belong to a name only where a file is called so."""
    stripped = text.strip()
    return text if text != stripped and _kind_of(folder / text) != _NOTHING else stripped


def _check_separator(path: Path, rows: Sequence[tuple[int, dict[Any, Any]]]) -> None:
    """Raise GraftError where names in the column `labels` seem to be separated otherwise."""
    cells = [(number, (row["labels"] or "").strip()) for number, row in rows]
    for number, cell in cells:
        if cell.startswith("[") and cell.endswith("]"):
            raise GraftError(
                f"--data {path}: line {number} has a JSON list in labels, {cell}; write the names "
                f"with {SEPARATOR} between them"
            )
    if any(SEPARATOR in cell for _, cell in cells):
        return
    for number, cell in cells:
        for other in ";,\t":
            if other in cell:
                raise GraftError(
                    f"--data {path}: line {number} has {cell!r} in labels, and no line has "
                    f"{SEPARATOR}; write {SEPARATOR} between names, or, where {other!r} is part of "
                    "a name and each image has one, call the column label"
                )


def _check_paths(path: Path, labelled: Labelled) -> tuple[str, ...]:
    """A note on images that are not there.

    Raises GraftError where a label has no other, and for what is no regular file: it is named
    without being opened, since reading a pipe or a device may never end.
    """
    kinds = [_kind_of(image) if isinstance(image, Path) else _FILE for _, _, image in labelled]
    others = [
        f"{each[0]} ({kind})"
        for each, kind in zip(labelled, kinds, strict=True)
        if kind not in (_FILE, _NOTHING)
    ]
    if others:
        raise GraftError(
            f"--data {path}: {len(others):,} of {len(labelled):,} paths are no image files: "
            f"{join_first(others)}; list regular files"
        )
    gone = [each for each, kind in zip(labelled, kinds, strict=True) if kind == _NOTHING]
    if not gone:
        return ()
    names = join_first([key for key, _, _ in gone])
    relative = [key for key, _, _ in gone if not Path(key).is_absolute()]
    where = f", looked for in {path.parent.resolve()}" if relative else ""
    found = f"{len(gone):,} of {len(labelled):,} images are not there{where}: {names}"
    if num_urls := sum(_URL.match(key) is not None for key, _, _ in gone):
        found += f" ({num_urls:,} of them are URLs, which Graft does not download)"
    rest, lost = _count_labels(labelled), _count_labels(gone)
    if any(rest[name] == number for name, number in lost.items()):
        raise GraftError(
            f"--data {path}: {found}; paths are relative to the CSV's own folder, or absolute"
        )
    return (found,)


def _kind_of(path: Path) -> str:
    """What stands at `path`."""
    try:
        mode = path.stat().st_mode
    # ValueError: a name with a NUL in it.
    except (OSError, ValueError):
        return _NOTHING
    if stat.S_ISREG(mode):
        return _FILE
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def _count_labels(labelled: Labelled) -> Counter[str]:
    return Counter(
        name for _, named, _ in labelled for name in ((named,) if isinstance(named, str) else named)
    )


def _find_repeats(labelled: Labelled) -> tuple[str, ...]:
    """A note on images that are listed again, with other labels or the same."""
    resolve = functools.cache(os.path.realpath)
    keys_of: dict[str, list[str]] = {}
    labels_of: dict[str, set[str]] = {}
    for key, named, image in labelled:
        # Links to folders are followed; a link to a file is found as a duplicate.
        place = f"{resolve(image.parent)}/{image.name}" if isinstance(image, Path) else key
        keys_of.setdefault(place, []).append(key)
        label = named if isinstance(named, str) else SEPARATOR.join(named)
        labels_of.setdefault(place, set()).add(label)
    again = [place for place, keys in keys_of.items() if len(keys) > 1]
    differ = [
        f"{', '.join(dict.fromkeys(keys_of[place]))} ({', '.join(sorted(labels_of[place]))})"
        for place in again
        if len(labels_of[place]) > 1
    ]
    same = [keys_of[place][0] for place in again if len(labels_of[place]) == 1]
    notes = []
    if differ:
        notes.append(
            f"paths with different labels: {len(differ):,}, {join_first(differ, 3)}; keep one line "
            f"for each, or write labels with {SEPARATOR} between them in a column labels"
        )
    if same:
        notes.append(f"paths listed more than once: {len(same):,}, {join_first(same, 3)}")
    return ("; ".join(notes),) if notes else ()


def _find_joined_labels(labelled: Labelled) -> tuple[str, ...]:
    """A note on classes whose names look like several labels in one cell."""
    joined = sorted(
        {named for _, named, _ in labelled if isinstance(named, str) and SEPARATOR in named}
    )
    if not joined:
        return ()
    return (
        f"classes with {SEPARATOR} in their names: {join_first(joined, 3)}; if it separates "
        "several labels, call the column labels",
    )


def _read_rows(path: Path) -> tuple[Sequence[str], list[tuple[int, dict[Any, Any]]]]:
    """The columns, and the rows with their line numbers."""
    try:
        try:
            return _parse_rows(path, "strict")
        except UnicodeDecodeError as error:
            # The name of a file may hold bytes that are no text, and splits.csv has them.
            columns, rows = _parse_rows(path, "surrogateescape")
            if not _are_names_of_files(path.parent, columns, rows):
                raise error
            return columns, rows
    except csv.Error as error:
        raise GraftError(f"--data {path}: not a CSV that can be read: {error}") from error
    except UnicodeDecodeError as error:
        is_utf16 = path.read_bytes()[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "text in UTF-16" if is_utf16 else "not text in UTF-8"
        raise GraftError(
            f"--data {path}: it is {encoding}; save it as CSV in UTF-8, separated by commas"
        ) from error


def _parse_rows(path: Path, errors: str) -> tuple[Sequence[str], list[tuple[int, dict[Any, Any]]]]:
    with path.open(newline="", encoding="utf-8-sig", errors=errors) as file:
        reader = csv.DictReader(file)
        # The reader counts blank lines, and line breaks in quotes.
        rows = [(reader.line_num, row) for row in reader]
        return reader.fieldnames or (), rows


def _are_names_of_files(
    folder: Path, columns: Sequence[str], rows: Sequence[tuple[int, dict[Any, Any]]]
) -> bool:
    """Whether all bytes that are no text stand in paths of files that are there."""
    if any(map(_is_undecoded, columns)):
        return False
    return all(
        column == "path" and _kind_of(folder / value) != _NOTHING
        for _, row in rows
        for column, value in row.items()
        if _is_undecoded(value)
    )


def _is_undecoded(value: object) -> bool:
    return isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if {"label", "labels"} <= set(columns):
        raise GraftError(
            f"--data {path}: it has both label and labels; keep label for one an image, "
            "or labels for any number of them"
        )
    misspelt = {name.strip().lower() for name in columns} & set(_COLUMNS) - set(columns)
    if misspelt or "path" not in columns or not {"label", "labels"} & set(columns):
        raise GraftError(
            f"--data {path}: it needs the columns path,label and perhaps split; "
            f"it has {_describe_columns(columns)} (where images have several labels, path,labels, "
            f"with {SEPARATOR} between their names)"
        )
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise GraftError(f"--data {path}: it has the column {twice[0]} more than once; keep one")


def _check_unused_columns(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[int, dict[Any, Any]]]
) -> tuple[str, ...]:
    """A note on columns that are not read. Raises GraftError where one may be the split."""
    unused = [name for name in columns if name.strip() and name not in _COLUMNS]
    for name in unused if "split" not in columns else ():
        values = sorted({(row[name] or "").strip() for _, row in rows})
        # A column with one value divides nothing.
        if len(values) > 1 and _may_be_split(name, values):
            raise GraftError(
                f"--data {path}: the column {name!r} ({join_first(values, 3)}) may say which split "
                "an image is of, and it is not read; if it does, call it split, with the values "
                "train, val and test; otherwise remove it"
            )
    return (f"columns not used: {join_first(unused)}",) if unused else ()


def _may_be_split(name: str, values: Sequence[str]) -> bool:
    plain = re.sub(r"[\W_]+", "", name.casefold())
    return _SPLIT_COLUMNS.fullmatch(plain) is not None or all(
        read_split_name(value) for value in values
    )


def _check_row(path: Path, number: int, row: dict[Any, Any], columns: Sequence[str]) -> None:
    line = f"--data {path}: line {number} has"
    if any(row.get(None) or ()):
        raise GraftError(
            f"{line} {len(columns) + len(row[None])} cells, the first line {len(columns)}; "
            'put a path or label with a comma in it into "quotes"'
        )
    if "\0" in (row["path"] or ""):
        raise GraftError(f"{line} a path with a NUL in it, which no file has")
    if not (row["path"] or "").strip():
        raise GraftError(f"{line} no path")
    column = "label" if "label" in columns else "labels"
    label = (row[column] or "").strip()
    if column == "label" and not label:
        raise GraftError(f"{line} no label")
    if label and not is_printable(label):
        raise GraftError(
            f"{line} {label!r} in {column}, which is no printable text; take line breaks and "
            "control characters out"
        )


def _read_split(path: Path, number: int, name: str | None) -> SplitName:
    split = read_split_name(name or "")
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
        for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if separator in columns[0]:
                return f"{columns[0]!r}, separated by {name}; save it separated by commas"
    lowered = {column.strip().lower() for column in columns}
    if lowered & set(_COLUMNS) - set(columns):
        names = ", ".join(map(repr, columns))
        return f"{names}; write them in small letters, without spaces around them"
    return ", ".join(columns) or "none"


def _load_torchvision(name: str, root: Path) -> Source:
    # Imported here: it imports torch, which other sources do not need.
    import torchvision

    base = torchvision.datasets.VisionDataset
    factory = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(factory) or not issubclass(factory, base) or factory is base:
        raise GraftError(
            f"--data torchvision:{name}: torchvision has no such data set; "
            "for example FashionMNIST, OxfordIIITPet, Flowers102, Food101"
        )
    _check_torchvision(factory, name)
    labelled: Labelled = []
    splits: list[SplitName] = []
    arguments_of = _torchvision_splits(factory)
    for split, arguments in arguments_of.items():
        dataset = _open_torchvision(factory, name, root, arguments)
        if dataset is None:
            continue
        names = getattr(dataset, "classes", None)
        for index, label in enumerate(_torchvision_labels(dataset, name)):
            label_name = str(names[label]) if names is not None else str(label)
            key = f"torchvision:{name}/{split}/{index}"
            labelled.append((key, label_name, TorchvisionImage(dataset, index)))
            splits.append(split)
    return Source(labelled, splits if len(arguments_of) > 1 else None)


def _check_torchvision(factory: Any, name: str) -> None:
    """Raise GraftError for a data set that needs more than a folder and a split."""
    if name in ("ImageFolder", "DatasetFolder"):
        raise GraftError(
            f"--data torchvision:{name}: it is a reader of class folders; say --data FOLDER"
        )
    parameters = inspect.signature(factory).parameters
    needed = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind is not each.VAR_KEYWORD and each.name != "root"
    ]
    if needed or "root" not in parameters:
        reason = f"it needs {join_first(needed)} too" if needed else "it is made without files"
        raise GraftError(
            f"--data torchvision:{name}: {reason}, and Graft gives a data set the arguments root, "
            f"train or split, and download; {_EXPORT}"
        )


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
    # A class may hand it on to the one that it is made of.
    can_download = any(
        "download" in inspect.signature(it).parameters for it in factory.__mro__[:-1]
    )
    try:
        return factory(root=str(root), **({"download": False} if can_download else {}), **arguments)
    except ValueError:
        return None
    except (RuntimeError, FileNotFoundError) as error:
        if not can_download:
            raise GraftError(
                f"--data torchvision:{name}: it is not under --data-root {root} "
                f"({first_line(error)}), and torchvision does not download it; put its files there"
            ) from error
        logger.info("torchvision:%s is not under %s: downloading it", name, root)
    except (TypeError, ImportError) as error:
        raise GraftError(f"--data torchvision:{name}: {first_line(error)}; {_EXPORT}") from error
    try:
        return factory(root=str(root), download=True, **arguments)
    # ValueError: the address that torchvision knows is gone, and it says so.
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(describe_error(error).split())
        raise GraftError(
            f"--data torchvision:{name}: it is not under --data-root {root} and could not be "
            f"downloaded ({reason}); run it once where there is a network, "
            "and copy that folder here"
        ) from error


def _torchvision_labels(dataset: Any, name: str) -> list[int]:
    try:
        for attribute in ("targets", "labels", "_labels"):
            labels = getattr(dataset, attribute, None)
            if labels is not None:
                return [int(label) for label in labels]
        return [int(dataset[index][1]) for index in range(len(dataset))]
    except (TypeError, ValueError, IndexError, ImportError) as error:
        raise GraftError(
            f"--data torchvision:{name}: its images have no class numbers ({first_line(error)}); "
            f"{_EXPORT}"
        ) from error


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
