"""A source of labelled images → Splits: a folder, a CSV, a torchvision data set, or the embedded digits."""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib.util
import inspect
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from finetune.strata import stratify_val
from models.errors import GraftError, in_words

logger = logging.getLogger("graft.data")

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
# Between the names of an image's labels in the column `labels` of a CSV.
SEPARATOR = "|"
NO_LABEL = -1
# What operating systems leave in folders; nobody means them as images.
_LITTER = {"Thumbs.db", "desktop.ini"}
# As finetune/strata.py numbers them.
_PARTS = {"train": 0, "val": 1}


@dataclass(frozen=True)
class TorchvisionImage:
    """One image of a torchvision data set, encoded without loss when it is read."""

    dataset: Any
    index: int

    def read_bytes(self) -> bytes:
        image = self.dataset[self.index][0]
        return _encode(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


@dataclass(frozen=True)
class EncodedImage:
    """An image already encoded, in memory."""

    data: bytes

    def read_bytes(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class Sample:
    """One labelled image; `key` names it in messages, and `label` is its place in `Splits.label_names`.

    In multi-label data `labels` are the places of all that it shows, perhaps none, in order, and `label` is NO_LABEL.
    """

    key: str
    label: int
    image: Path | EncodedImage | TorchvisionImage
    labels: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """What splits.csv knows it by, from whatever folder it is read: the file's whole path, or the key."""
        return str(self.image.resolve()) if isinstance(self.image, Path) else self.key

    def read(self) -> bytes:
        return self.image.read_bytes()


@dataclass(frozen=True)
class Splits:
    """The labelled images of a run; `test` may be empty. `is_drawn` where Graft split train and val, and the source did not.

    `is_multi_label` where an image has any number of labels, and not just one.
    """

    label_names: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    is_drawn: bool = field(default=False, compare=False)
    is_multi_label: bool = False

    def named(self) -> Iterable[tuple[SplitName, tuple[Sample, ...]]]:
        yield "train", self.train
        yield "val", self.val
        if self.test:
            yield "test", self.test

    def labels(self, samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
        """Of each sample its label, `[N]`; in multi-label data a row with 1 for each label that it has and 0 for the others, `[N,C]`."""
        if self.is_multi_label:
            return _label_rows(samples, len(self.label_names))
        return np.array([sample.label for sample in samples], np.int64)

    def describe(self, sample: Sample) -> str:
        """The name of a sample's label; in multi-label data those of all its labels with `|` between them, as a CSV has them."""
        return self.join(sample.labels) if self.is_multi_label else self.label_names[sample.label]

    def join(self, labels: Iterable[int]) -> str:
        """Names with `|` between them."""
        return SEPARATOR.join(self.label_names[label] for label in labels)

    def without(self, unreadable: Iterable[str], *, check: bool = True) -> Splits:
        """The same splits less some keys; where a class loses its last image of a split that it needs, `check` raises GraftError."""
        gone = set(unreadable)

        def keep(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
            return tuple(sample for sample in samples if sample.key not in gone)

        kept = replace(self, train=keep(self.train), val=keep(self.val), test=keep(self.test))
        if gone and check:
            _check_classes(kept, "after leaving out unreadable images")
        return kept

    def write_csv(self, path: Path) -> None:
        """`path,label,split` (`labels` in multi-label data), as `--data FILE.csv` reads it; whole or not at all: a later run goes by it."""
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("path", "labels" if self.is_multi_label else "label", "split"))
            for split, samples in self.named():
                for sample in samples:
                    rows.writerow((sample.place, self.describe(sample), split))
        unfinished.replace(path)


@dataclass(frozen=True)
class KeptSplit:
    """An earlier run's: the split of each image by its `place`, and the file that says so."""

    path: Path
    split_of: Mapping[str, SplitName]


def load_splits(data: str, *, data_root: Path, val_fraction: float, seed: int, kept: KeptSplit | None = None, check: bool = True) -> Splits:
    """The images of `--data`, split; where Graft has to draw the split, images stay where an earlier run had them.

    Raises GraftError with the way out where there is nothing to train on, and, unless `check` is off, where a class is missing.
    """
    if data == "digits":
        labelled, fixed = _load_digits(), None
    elif data.startswith("torchvision:"):
        labelled, fixed = _load_torchvision(data.partition(":")[2], data_root)
    else:
        path = Path(data).expanduser()
        try:
            if not path.exists():
                raise GraftError(f"--data {data}: there is no such file or folder; or say digits, or torchvision:NAME")
            labelled, fixed = _load_csv(path) if path.is_file() else _load_folder(path)
        except OSError as error:
            where = "" if error.filename in (None, str(path)) else f": {error.filename}"
            raise GraftError(f"--data {data[:80]}: it cannot be read: {error.strerror}{where}") from error
    return _to_splits(data, labelled, fixed, val_fraction, seed, kept, check)


# A source gives (key, label name, image) and, where it has splits of its own, the split of each. Multi-label data has tuples of names.
_Labelled = list[tuple[str, str | tuple[str, ...], "Path | EncodedImage | TorchvisionImage"]]
_FixedSplits = list[SplitName] | None


def _load_digits() -> _Labelled:
    # scikit-learn ships the images as a CSV; importing it to read one costs a second or two.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise GraftError("--data digits: scikit-learn, which ships the images, is not installed")
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    # A frame of one pixel keeps the strokes, which touch the border of the 8x8, inside the centre crop: 0.974 instead of 0.946.
    images = (Image.fromarray(np.pad(row[:64].reshape(8, 8) * 15, 1)) for row in rows)
    return [
        (f"digits/{index:04d}.png", str(row[64]), EncodedImage(_encode(image)))
        for index, (row, image) in enumerate(zip(rows, images, strict=True))
    ]


def _load_folder(root: Path) -> tuple[_Labelled, _FixedSplits]:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    split_folders = {path: _SPLIT_FOLDERS[path.name.lower()] for path in folders if path.name.lower() in _SPLIT_FOLDERS}
    if "train" not in split_folders.values():
        return _load_class_folders(root, folders), None
    labelled: _Labelled = []
    splits: list[SplitName] = []
    for folder, split in split_folders.items():
        classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        found = _load_class_folders(folder, classes)
        labelled += found
        splits += [split] * len(found)
    return labelled, splits


def _load_class_folders(root: Path, folders: list[Path]) -> _Labelled:
    if not folders:
        raise GraftError(
            f"--data {root}: no class folders in it; put the images of each class in a folder named after the class "
            "(photos/cat/1.jpg, photos/dog/2.jpg), or in train/ and val/ with class folders each"
        )
    for folder in folders:
        if not folder.name.isprintable() or any("\ud800" <= char <= "\udfff" for char in folder.name):
            raise GraftError(f"--data {root}: the class folder {folder.name!r} has a name that is no printable text; rename it")
    images = {folder: _image_files(folder) for folder in folders}
    if empty := [folder.name for folder, paths in images.items() if not paths]:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        logger.warning("--data %s: no file in the class folders %s%s; they are left out", root, ", ".join(empty[:10]), more)
    return [(str(path), folder.name, path) for folder, paths in images.items() for path in paths]


def _image_files(folder: Path) -> list[Path]:
    """Every file below a class folder: what is an image is decided by its content when it is read, not by its name."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _LITTER and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _load_csv(path: Path) -> tuple[_Labelled, _FixedSplits]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            # Blank lines are skipped and quoted ones may be broken, so a row's line is the reader's to say.
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or ()
    except csv.Error as error:
        raise GraftError(f"--data {path}: not a CSV that can be read: {error}") from error
    except UnicodeDecodeError as error:
        encoding = "text in UTF-16" if path.read_bytes()[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "not text in UTF-8"
        raise GraftError(f"--data {path}: it is {encoding}; save it as CSV in UTF-8, separated by commas") from error
    is_multi_label = "labels" in columns
    if is_multi_label and "label" in columns:
        raise GraftError(f"--data {path}: it has both label and labels; keep label for one an image, or labels for any number of them")
    if "path" not in columns or not (is_multi_label or "label" in columns):
        raise GraftError(
            f"--data {path}: it needs the columns path,label and perhaps split; it has {_describe_columns(columns)} (where images have "
            f"several labels, path,labels, with {SEPARATOR} between their names)"
        )
    labelled: _Labelled = []
    splits: list[SplitName] = []
    for number, row in rows:
        if not row["path"] or not (is_multi_label or row["label"]):
            raise GraftError(f"--data {path}: line {number} has no {'path' if not row['path'] else 'label'}")
        label = _split_names(row["labels"] or "") if is_multi_label else row["label"]
        labelled.append((row["path"], label, path.parent / row["path"]))
        if "split" in columns:
            split = _SPLIT_FOLDERS.get((row["split"] or "").lower())
            if split is None:
                raise GraftError(f"--data {path}: line {number} has the split {row['split']!r}; allowed are train, val and test")
            splits.append(split)
    return labelled, splits if "split" in columns else None


def _split_names(text: str) -> tuple[str, ...]:
    """Each name once, in order; an empty text has none."""
    return tuple(sorted({name.strip() for name in text.split(SEPARATOR)} - {""}))


def _describe_columns(columns: Sequence[str]) -> str:
    """What a CSV has in place of path,label and why they were not found, where that can be seen."""
    if len(columns) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs")):
            if separator in columns[0]:
                return f"{columns[0]!r}, separated by {name}; save it separated by commas"
    lowered = {column.strip().lower() for column in columns}
    if "path" in lowered and lowered & {"label", "labels"}:
        return f"{', '.join(map(repr, columns))}; write them in small letters, without spaces around them"
    return ", ".join(columns) or "none"


def _load_torchvision(name: str, root: Path) -> tuple[_Labelled, _FixedSplits]:
    # Imported here: it brings torch along, which the other sources need not wait for.
    import torchvision

    factory = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(factory) or not issubclass(factory, torchvision.datasets.VisionDataset):
        raise GraftError(
            f"--data torchvision:{name}: torchvision has no such data set; for example FashionMNIST, OxfordIIITPet, Flowers102, Food101"
        )
    parameters = inspect.signature(factory).parameters
    wanted: list[tuple[SplitName, dict[str, Any]]] = [("train", {})]
    if "train" in parameters:
        wanted = [("train", {"train": True}), ("test", {"train": False})]
    elif "split" in parameters:
        official = "trainval" if parameters["split"].default == "trainval" else "train"
        wanted = [("train", {"split": official}), ("val", {"split": "val"}), ("test", {"split": "test"})]
    labelled: _Labelled = []
    splits: list[SplitName] = []
    for split, arguments in wanted:
        dataset = _open_torchvision(factory, name, root, arguments)
        if dataset is None:
            continue
        names = getattr(dataset, "classes", None)
        for index, label in enumerate(_torchvision_labels(dataset)):
            label_name = str(names[label]) if names is not None else str(label)
            labelled.append((f"torchvision:{name}/{split}/{index}", label_name, TorchvisionImage(dataset, index)))
            splits.append(split)
    return labelled, splits if len(wanted) > 1 else None


def _open_torchvision(factory: Any, name: str, root: Path, arguments: dict[str, Any]) -> Any | None:
    """The data set from disk, else downloaded; None where it has no split of that name."""
    try:
        return factory(root=str(root), download=False, **arguments)
    except ValueError:
        return None
    except (RuntimeError, FileNotFoundError):
        logger.info("torchvision:%s is not under %s: downloading it", name, root)
    try:
        return factory(root=str(root), download=True, **arguments)
    except (OSError, RuntimeError) as error:
        reason = " ".join(in_words(error).split())
        raise GraftError(
            f"--data torchvision:{name}: it is not under --data-root {root} and could not be downloaded ({reason}); "
            f"run it once where there is a network, and copy that folder here"
        ) from error


def _torchvision_labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            return [int(label) for label in labels]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _to_splits(
    data: str, labelled: _Labelled, fixed: _FixedSplits, val_fraction: float, seed: int, kept: KeptSplit | None, check: bool
) -> Splits:
    if not labelled:
        raise GraftError(f"--data {data}: there is no image in it")
    is_multi_label = isinstance(labelled[0][1], tuple)
    label_names = tuple(sorted({name for _, label, _ in labelled for name in ([label] if isinstance(label, str) else label)}))
    numbers = {name: number for number, name in enumerate(label_names)}
    samples = [
        Sample(key, numbers[label], image)
        if isinstance(label, str)
        else Sample(key, NO_LABEL, image, tuple(numbers[name] for name in label))
        for key, label, image in labelled
    ]
    chosen: list[SplitName] = list(fixed) if fixed is not None else ["train"] * len(samples)
    if is_multi_label and not label_names:
        raise GraftError(f"--data {data}: no image has a label; the column labels takes names with {SEPARATOR} between them")
    if not is_multi_label and len(label_names) < 2:
        raise GraftError(f"--data {data}: only one class, {label_names[0]!r}; a classifier needs two or more")
    is_drawn = "val" not in chosen
    if is_drawn and is_multi_label:
        _split_off_val_of_many(samples, len(label_names), chosen, val_fraction, seed, kept)
    elif is_drawn:
        _split_off_val(data, samples, label_names, chosen, val_fraction, seed, kept, check)
    by_split = {
        name: tuple(sample for sample, split in zip(samples, chosen, strict=True) if split == name) for name in ("train", "val", "test")
    }
    splits = Splits(label_names, by_split["train"], by_split["val"], by_split["test"], is_drawn, is_multi_label)
    if check:
        _check_classes(splits, f"--data {data}")
    return splits


def _split_off_val(
    data: str,
    samples: list[Sample],
    label_names: tuple[str, ...],
    chosen: list[SplitName],
    val_fraction: float,
    seed: int,
    kept: KeptSplit | None,
    check: bool,
) -> None:
    """Move a seeded, stratified share of the training images to validation, at least one of each class.

    What an earlier run had stays where it was, and new images make up the share.
    """
    was = {} if kept is None else {index: kept.split_of.get(sample.place) for index, sample in enumerate(samples)}
    generator = np.random.default_rng(seed)
    num_kept = num_to_train = num_to_val = 0
    for label, name in enumerate(label_names):
        members = [index for index, sample in enumerate(samples) if sample.label == label and chosen[index] == "train"]
        if len(members) == 1 and check:
            raise GraftError(f"--data {data}: class {name!r} has one image; it needs two or more, one of them to validate on")
        in_val = [index for index in members if was.get(index) == "val"]
        new = [index for index in members if was.get(index) not in ("train", "val")]
        num_val = min(max(1, round(len(members) * val_fraction)), len(members) - 1)
        num_new = min(max(0, num_val - len(in_val)), len(new))
        for index in (*in_val, *generator.permutation(new)[:num_new]):
            chosen[index] = "val"
        num_kept += len(members) - len(new)
        num_to_train += len(new) - num_new
        num_to_val += num_new
    _say_kept(kept, num_kept, num_to_train, num_to_val)


def _split_off_val_of_many(
    samples: list[Sample], num_labels: int, chosen: list[SplitName], val_fraction: float, seed: int, kept: KeptSplit | None
) -> None:
    """The same for images of any number of labels; what an earlier run had counts for the share of each label."""
    pool = [index for index, split in enumerate(chosen) if split == "train"]
    rows = _label_rows([samples[index] for index in pool], num_labels)
    was = [None if kept is None else kept.split_of.get(samples[index].place) for index in pool]
    placed = np.array([_PARTS.get(split or "", -1) for split in was], np.int64)
    is_val = stratify_val(rows, val_fraction, seed, placed) == _PARTS["val"]
    for index, to_val in zip(pool, is_val, strict=True):
        chosen[index] = "val" if to_val else "train"
    is_new = placed < 0
    _say_kept(kept, int((~is_new).sum()), int((is_new & ~is_val).sum()), int((is_new & is_val).sum()))


def _say_kept(kept: KeptSplit | None, num_kept: int, num_to_train: int, num_to_val: int) -> None:
    if kept is not None and num_kept:
        new_ones = f"; new: {num_to_train:,} to train, {num_to_val:,} to val" if num_to_train + num_to_val else ""
        logger.info("split: %d images stay where %s has them%s (--new-split draws anew)", num_kept, kept.path, new_ones)


def _label_rows(samples: Sequence[Sample], num_labels: int) -> npt.NDArray[np.int64]:
    rows = np.zeros((len(samples), num_labels), np.int64)
    for row, sample in zip(rows, samples, strict=True):
        row[list(sample.labels)] = 1
    return rows


def count_labels(samples: Iterable[Sample]) -> Counter[int]:
    """How many samples have each label."""
    return Counter(label for sample in samples for label in ((sample.label,) if sample.label != NO_LABEL else sample.labels))


def _check_classes(splits: Splits, where: str) -> None:
    anew = ", or say --new-split where an earlier run had it otherwise" if splits.is_drawn else ""
    counts = {split: count_labels(samples) for split, samples in splits.named()}
    for label, name in enumerate(splits.label_names):
        if splits.is_multi_label and counts["train"][label] == len(splits.train) > 0:
            raise GraftError(f"{where}: every image to train on has the label {name!r}, so that it cannot be learnt; take it out{anew}")
        if not counts["train"][label]:
            raise GraftError(f"{where}: class {name!r} has no image to train on; add some to train/, or take the class out{anew}")
        if not counts["val"][label]:
            raise GraftError(
                f"{where}: class {name!r} has no image to validate on; add some to val/, or put train/ and val/ together "
                f"in one folder of class folders and Graft splits them{anew}"
            )


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
