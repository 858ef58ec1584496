"""Labelled images → Splits: what is trained on, validated on and tested on, with whatever an earlier run put where."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.data.strata import stratify_val
from models.errors import GraftError
from models.files import write_whole
from models.sources import (
    SEPARATOR,
    EncodedImage,
    FixedSplits,
    Labelled,
    SplitName,
    TorchvisionImage,
    read_source,
)

logger = logging.getLogger("graft.data")

NO_LABEL = -1
# As finetune/data/strata.py numbers them.
_PARTS = {"train": 0, "val": 1}


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
        write_whole(path, self._write_rows)

    def _write_rows(self, path: Path) -> None:
        # A path may hold bytes that are no text.
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(("path", "labels" if self.is_multi_label else "label", "split"))
            for split, samples in self.named():
                for sample in samples:
                    rows.writerow((sample.place, self.describe(sample), split))


@dataclass(frozen=True)
class KeptSplit:
    """An earlier run's: the split of each image by its `place`, and the file that says so."""

    path: Path
    split_of: Mapping[str, SplitName]


def load_splits(
    data: str,
    *,
    data_root: Path,
    val_fraction: float,
    seed: int,
    kept: KeptSplit | None = None,
    check: bool = True,
) -> Splits:
    """The images of `--data`, split; where Graft has to draw the split, images stay where an earlier run had them.

    Raises GraftError with the way out where there is nothing to train on, and, unless `check` is off, where a class is missing.
    """
    labelled, fixed = read_source(data, data_root)
    return _to_splits(data, labelled, fixed, val_fraction, seed, kept, check)


def _to_splits(
    data: str,
    labelled: Labelled,
    fixed: FixedSplits,
    val_fraction: float,
    seed: int,
    kept: KeptSplit | None,
    check: bool,
) -> Splits:
    if not labelled:
        raise GraftError(f"--data {data}: there is no image in it")
    is_multi_label = isinstance(labelled[0][1], tuple)
    label_names = tuple(
        sorted(
            {
                name
                for _, label, _ in labelled
                for name in ([label] if isinstance(label, str) else label)
            }
        )
    )
    numbers = {name: number for number, name in enumerate(label_names)}
    samples = [
        Sample(key, numbers[label], image)
        if isinstance(label, str)
        else Sample(key, NO_LABEL, image, tuple(numbers[name] for name in label))
        for key, label, image in labelled
    ]
    chosen: list[SplitName] = list(fixed) if fixed is not None else ["train"] * len(samples)
    if is_multi_label and not label_names:
        raise GraftError(
            f"--data {data}: no image has a label; the column labels takes names with {SEPARATOR} between them"
        )
    if not is_multi_label and len(label_names) < 2:
        raise GraftError(
            f"--data {data}: only one class, {label_names[0]!r}; a classifier needs two or more"
        )
    is_drawn = "val" not in chosen
    if is_drawn and is_multi_label:
        _split_off_val_of_many(samples, len(label_names), chosen, val_fraction, seed, kept)
    elif is_drawn:
        _split_off_val(data, samples, label_names, chosen, val_fraction, seed, kept, check)
    by_split = {
        name: tuple(sample for sample, split in zip(samples, chosen, strict=True) if split == name)
        for name in ("train", "val", "test")
    }
    splits = Splits(
        label_names, by_split["train"], by_split["val"], by_split["test"], is_drawn, is_multi_label
    )
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
    was = (
        {}
        if kept is None
        else {index: kept.split_of.get(sample.place) for index, sample in enumerate(samples)}
    )
    generator = np.random.default_rng(seed)
    num_kept = num_to_train = num_to_val = 0
    for label, name in enumerate(label_names):
        members = [
            index
            for index, sample in enumerate(samples)
            if sample.label == label and chosen[index] == "train"
        ]
        if len(members) == 1 and check:
            raise GraftError(
                f"--data {data}: class {name!r} has one image; it needs two or more, one of them to validate on"
            )
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
    samples: list[Sample],
    num_labels: int,
    chosen: list[SplitName],
    val_fraction: float,
    seed: int,
    kept: KeptSplit | None,
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
    _say_kept(
        kept, int((~is_new).sum()), int((is_new & ~is_val).sum()), int((is_new & is_val).sum())
    )


def _say_kept(kept: KeptSplit | None, num_kept: int, num_to_train: int, num_to_val: int) -> None:
    if kept is not None and num_kept:
        new_ones = (
            f"; new: {num_to_train:,} to train, {num_to_val:,} to val"
            if num_to_train + num_to_val
            else ""
        )
        logger.info(
            "split: %d images stay where %s has them%s (--new-split draws anew)",
            num_kept,
            kept.path,
            new_ones,
        )


def _label_rows(samples: Sequence[Sample], num_labels: int) -> npt.NDArray[np.int64]:
    rows = np.zeros((len(samples), num_labels), np.int64)
    for row, sample in zip(rows, samples, strict=True):
        row[list(sample.labels)] = 1
    return rows


def count_labels(samples: Iterable[Sample]) -> Counter[int]:
    """How many samples have each label."""
    return Counter(
        label
        for sample in samples
        for label in ((sample.label,) if sample.label != NO_LABEL else sample.labels)
    )


def _check_classes(splits: Splits, where: str) -> None:
    anew = ", or say --new-split where an earlier run had it otherwise" if splits.is_drawn else ""
    counts = {split: count_labels(samples) for split, samples in splits.named()}
    for label, name in enumerate(splits.label_names):
        if splits.is_multi_label and counts["train"][label] == len(splits.train) > 0:
            raise GraftError(
                f"{where}: every image to train on has the label {name!r}, so that it cannot be learnt; take it out{anew}"
            )
        if not counts["train"][label]:
            raise GraftError(
                f"{where}: class {name!r} has no image to train on; add some to train/, or take the class out{anew}"
            )
        if not counts["val"][label]:
            raise GraftError(
                f"{where}: class {name!r} has no image to validate on; add some to val/, or put train/ and val/ together "
                f"in one folder of class folders and Graft splits them{anew}"
            )
