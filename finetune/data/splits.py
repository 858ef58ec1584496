"""Labelled images → Splits: what is trained on, validated on and tested on."""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.tasks.choose import choose_task
from finetune.tasks.single_label import SINGLE_LABEL
from finetune.tasks.task import Label, Task
from models.errors import GraftError, join_first
from models.files import write_whole
from models.image_folder import check_unicode_forms, find_case_twins, has_image_suffix
from models.images import NUM_MAGIC_BYTES, begins_as
from models.scores import Labels
from models.sources import (
    EncodedImage,
    FixedSplits,
    Labelled,
    SplitName,
    TorchvisionImage,
    read_source,
)

logger = logging.getLogger("graft.data")

# As the task numbers the parts that it divides images into.
_PARTS = {"train": 0, "val": 1}
_NUM_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Sample:
    """One labelled image. `key` names it in messages; its task says what a `label` is."""

    key: str
    label: Label
    image: Path | EncodedImage | TorchvisionImage

    @property
    def place(self) -> str:
        """How splits.csv names it, from any folder: the file's whole path, or the key."""
        return str(self.image.resolve()) if isinstance(self.image, Path) else self.key

    def read(self) -> bytes:
        """The encoded image."""
        return self.image.read_bytes()


@dataclass(frozen=True)
class Splits:
    """The labelled images of a run; `test` may be empty.

    `is_drawn` if Graft split train and val, and the source did not; `is_kept` if images are where
    an earlier run had them.
    """

    label_names: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    is_drawn: bool = field(default=False, compare=False)
    is_kept: bool = field(default=False, compare=False)
    task: Task = SINGLE_LABEL

    def named(self) -> Iterable[tuple[SplitName, tuple[Sample, ...]]]:
        """Each split that has a name in metrics; "test" only if it has images."""
        yield "train", self.train
        yield "val", self.val
        if self.test:
            yield "test", self.test

    def labels(self, samples: Sequence[Sample]) -> Labels:
        """Labels as the task encodes them: `[N]`, or `[N,C]` of 0 and 1."""
        return self.task.encode([sample.label for sample in samples], len(self.label_names))

    def count_labels(self, samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
        """How many samples have each label, `[C]`."""
        return self.task.count(self.labels(samples), len(self.label_names))

    def describe(self, sample: Sample) -> str:
        """A sample's label as a CSV has it."""
        return self.task.describe(sample.label, self.label_names)

    def without(self, unreadable: Iterable[str], *, check: bool = True) -> Splits:
        """The same splits less the samples with these keys.

        Raises GraftError under `check` if a class loses its last image of a split that it needs.
        """
        gone = set(unreadable)

        def keep(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
            return tuple(sample for sample in samples if sample.key not in gone)

        kept = replace(self, train=keep(self.train), val=keep(self.val), test=keep(self.test))
        if gone and check:
            _check_classes(kept, "after leaving out unreadable images")
        return kept

    def write_csv(self, path: Path) -> None:
        """`path,label,split` (or `labels`), as `--data FILE.csv` reads it."""
        write_whole(path, self._write_csv)

    def _write_csv(self, path: Path) -> None:
        # A path may hold bytes that are not text.
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(("path", self.task.label_column, "split"))
            for split, samples in self.named():
                for sample in samples:
                    rows.writerow((sample.place, self.describe(sample), split))


@dataclass(frozen=True)
class KeptSplit:
    """An earlier run's split of each image, by its `place`, and the file that it was read from."""

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
    strict: bool = False,
) -> Splits:
    """Read the images of `--data` and split them.

    Where Graft draws the split, images stay where `kept` has them. Raises GraftError if there is
    nothing to train on; under `check`, if a class has no image of a split that it needs; under
    `strict`, if a folder cannot be read.
    """
    source = read_source(data, data_root)
    if strict and source.closed:
        raise GraftError(
            f"--data {data}: folders that cannot be read: {join_first(source.closed)}; make them "
            "readable (--strict stops here; without it they are left out)"
        )
    splits = _to_splits(data, source.labelled, source.splits, val_fraction, seed, kept)
    _log_seen(data, splits, (*source.notes, *_describe_case_twins(splits.label_names)))
    if check:
        _check_classes(splits, f"--data {data}")
    return splits


def _describe_case_twins(names: Sequence[str]) -> tuple[str, ...]:
    """A note on class names that differ by case alone."""
    twins = [f"{first} and {second}" for first, second in find_case_twins(names)]
    if not twins:
        return ()
    return (
        f"names that differ by case alone ({join_first(twins)}): give them one spelling where "
        "they are one class",
    )


def _log_seen(data: str, splits: Splits, notes: Sequence[str]) -> None:
    """What was seen in the source, in one line: a warning if something was left out."""
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    words = splits.task.words.labels_of_images
    names = join_first(splits.label_names, _NUM_NAMES_SHOWN)
    left_out = f"; left out or to be looked at: {'; '.join(notes)}" if notes else ""
    logger.log(
        logging.WARNING if notes else logging.INFO,
        "%s: %d %s, images: %s; %s: %s%s",
        data,
        len(splits.label_names),
        words,
        sizes,
        splits.task.words.labels,
        names,
        left_out,
    )


def _to_splits(
    data: str,
    labelled: Labelled,
    fixed: FixedSplits,
    val_fraction: float,
    seed: int,
    kept: KeptSplit | None,
) -> Splits:
    if not labelled:
        raise GraftError(f"--data {data}: there is no image in it")
    task = choose_task(labelled[0][1])
    label_names = _collect_names(labelled)
    task.check_label_names(label_names, data)
    check_unicode_forms(data, label_names)
    numbers = {name: number for number, name in enumerate(label_names)}
    samples = [Sample(key, task.number(named, numbers), image) for key, named, image in labelled]
    chosen: list[SplitName] = list(fixed) if fixed is not None else ["train"] * len(samples)
    splits = Splits(label_names, *_group(samples, chosen), is_drawn="val" not in chosen, task=task)
    if splits.is_drawn:
        splits = _split_off_val(splits, val_fraction, seed, kept)
    return splits


def _collect_names(labelled: Labelled) -> tuple[str, ...]:
    names = {
        name for _, named, _ in labelled for name in ((named,) if isinstance(named, str) else named)
    }
    return tuple(sorted(names))


def _group(
    samples: Sequence[Sample], chosen: Sequence[SplitName]
) -> tuple[tuple[Sample, ...], tuple[Sample, ...], tuple[Sample, ...]]:
    """The samples of train, val and test."""

    def group(name: SplitName) -> tuple[Sample, ...]:
        return tuple(sample for sample, split in zip(samples, chosen, strict=True) if split == name)

    return group("train"), group("val"), group("test")


def _split_off_val(
    splits: Splits, val_fraction: float, seed: int, kept: KeptSplit | None
) -> Splits:
    """Move a seeded, stratified fraction of the training images to validation.

    Images of an earlier run stay where it had them, and new images make up the fraction.
    """
    earlier = [None if kept is None else kept.split_of.get(each.place) for each in splits.train]
    placed = np.array([_PARTS.get(split or "", -1) for split in earlier], np.int64)
    labels = splits.labels(splits.train)
    is_val = splits.task.split_off_val(labels, len(splits.label_names), val_fraction, seed, placed)
    if kept is not None:
        _log_kept(kept.path, placed, is_val)
    train, val = (
        tuple(sample for sample, is_here in zip(splits.train, is_side, strict=True) if is_here)
        for is_side in (~is_val, is_val)
    )
    return replace(splits, train=train, val=val, is_kept=bool((placed >= 0).any()))


def _log_kept(path: Path, placed: npt.NDArray[np.int64], is_val: npt.NDArray[np.bool_]) -> None:
    is_new = placed < 0
    if is_new.all():
        return
    num_to_train, num_to_val = int((is_new & ~is_val).sum()), int((is_new & is_val).sum())
    new = f"; new: {num_to_train:,} to train, {num_to_val:,} to val" if is_new.any() else ""
    logger.info(
        "split: %d images stay where %s has them%s (--new-split draws anew)",
        int((~is_new).sum()),
        path,
        new,
    )


def _check_classes(splits: Splits, where: str) -> None:
    anew = ", or say --new-split: an earlier run had it otherwise" if splits.is_kept else ""
    labels = splits.labels(splits.train)
    if problem := splits.task.find_unlearnable(labels, splits.label_names):
        raise GraftError(f"{where}: {problem}{anew}")
    counts = list(
        zip(
            splits.label_names,
            splits.count_labels(splits.train).tolist(),
            splits.count_labels(splits.val).tolist(),
            strict=True,
        )
    )
    single = [name for name, *nums in counts if splits.is_drawn and sum(nums) == 1]
    no_image = _find_other_files(splits, single)
    rest = [each for each in counts if each[0] not in single]
    without_train = [name for name, num_train, _ in rest if not num_train]
    without_val = [name for name, num_train, num_val in rest if num_train and not num_val]
    problems = []
    if no_image:
        problems.append(
            f"{_name_classes(list(no_image))} no image, only a file that is none "
            f"({join_first(list(no_image.values()))}); add images, or take the class out"
        )
    if with_image := [name for name in single if name not in no_image]:
        problems.append(
            f"{_name_classes(with_image)} one image; it needs two or more, one of them to validate "
            "on: add images, or take the class out"
        )
    if without_train:
        problems.append(
            f"{_name_classes(without_train)} no image to train on; add some to train/, or take the "
            f"class out{anew}"
        )
    if without_val:
        problems.append(
            f"{_name_classes(without_val)} no image to validate on; add some to val/, or put "
            f"train/ and val/ together in one folder of class folders and Graft splits them{anew}"
        )
    if problems:
        problems += _describe_case_twins(splits.label_names)
        raise GraftError(f"{where}: {'; '.join(problems)}")


def _find_other_files(splits: Splits, names: Sequence[str]) -> dict[str, str]:
    """Of classes with one file, those whose file is an image by neither name nor content."""
    found = {}
    for sample in (*splits.train, *splits.val) if names else ():
        name = splits.describe(sample)
        path = sample.image
        if name in names and isinstance(path, Path) and not has_image_suffix(path):
            with contextlib.suppress(OSError), path.open("rb") as file:
                if begins_as(file.read(NUM_MAGIC_BYTES)) is None:
                    found[name] = sample.key
    return found


def _name_classes(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    if len(names) == 1:
        return f"class {quoted[0]} has"
    return f"each of the {len(names)} classes {join_first(quoted, _NUM_NAMES_SHOWN)} has"
