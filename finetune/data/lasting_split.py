"""A split that lasts: images stay where an earlier run had them, and duplicates stay on one side."""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from finetune.config import SharedOptions, source_of
from finetune.data.duplicates import Duplicates, find_duplicates, open_grids
from finetune.data.splits import KeptSplit, Sample, Splits, load_splits
from finetune.data.strata import stratify
from models.scores import Labels
from models.sources import SplitName

logger = logging.getLogger("graft.split")

_SIDES: dict[str, SplitName] = {"train": "train", "val": "val"}


def load_lasting_splits(
    options: SharedOptions,
    *,
    check: bool = True,
    restore: Callable[[Splits], Splits | None] | None = None,
) -> tuple[Splits, Duplicates]:
    """The images of `--data` and which of them are copies; `check` as in load_splits.

    Where Graft draws the split, images stay where the newest run on them under `--output` had them, and copies are on one side. What
    `restore` makes of the loaded ones, a resumed run's own, stays as it is.
    """
    kept = None if options.new_split else find_kept_split(options)
    splits = load_splits(
        options.data,
        data_root=options.data_root,
        val_fraction=options.val_fraction,
        seed=options.seed,
        kept=kept,
        check=check,
    )
    restored = None if restore is None else restore(splits)
    splits = restored or splits
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(open_grids(options.cache_dir)) if options.cache else None
        duplicates = find_duplicates(splits, num_workers=options.workers, cache=cache)
    return restored or keep_together(splits, duplicates.groups, kept, seed=options.seed), duplicates


def find_kept_split(options: SharedOptions) -> KeptSplit | None:
    """The split of the newest run under `--output` on the same source of images; None where there was none."""
    # A run's folder is named after its model and its time, so that the names of two models do not sort by time.
    written = ((path.stat().st_mtime_ns, path) for path in options.output.glob("*/splits.csv"))
    for _, path in sorted(written, reverse=True):
        if _source_of_run(path.parent) != options.source:
            continue
        try:
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                split_of = {
                    row["path"]: _SIDES[row["split"]]
                    for row in csv.DictReader(file)
                    if row["split"] in _SIDES
                }
        except (OSError, ValueError, KeyError, csv.Error):
            split_of = {}
        if split_of:
            return KeptSplit(path, split_of)
        logger.warning("%s is damaged: an older run's split is looked for", path)
    return None


def keep_together(
    splits: Splits, groups: Sequence[Sequence[Sample]], kept: KeptSplit | None, *, seed: int
) -> Splits:
    """`splits` with each group of duplicates on one side, where Graft drew the split; the very same object where none has to move.

    A group goes to the side where an earlier run had one of it, to train
    where that was both, so that no training image moves into validation; else to train. Other new images make up for what validation
    loses. A class that would be left without images on a side keeps its duplicates where they are.
    """
    if not splits.is_drawn:
        return splits
    pool = [*splits.train, *splits.val]
    labels = splits.labels(pool)
    before = np.arange(len(pool)) >= len(splits.train)
    is_val, is_bound = before.copy(), np.zeros(len(pool), bool)
    was = (
        [None] * len(pool) if kept is None else [kept.split_of.get(sample.place) for sample in pool]
    )
    places = {id(sample): index for index, sample in enumerate(pool)}
    for group in groups:
        members = [places[id(sample)] for sample in group if id(sample) in places]
        is_bound[members] = True
        if before[members].any() and not before[members].all():
            sides = {was[index] for index in members}
            is_val[members] = "val" in sides and "train" not in sides
    if (is_val == before).all():
        return splits
    if splits.is_multi_label:
        can_move = ~is_val & ~is_bound & np.array([side is None for side in was])
        is_val = _fill_val(labels, before, is_val, can_move, seed)
    generator = np.random.default_rng(seed)
    for label in () if splits.is_multi_label else np.unique(labels):
        of_class = labels == label
        can_move = np.array(
            [
                index
                for index in np.flatnonzero(of_class & ~is_val & ~is_bound)
                if was[index] is None
            ],
            np.int64,
        )
        num_missing = max(0, int(before[of_class].sum() - is_val[of_class].sum()))
        is_val[generator.permutation(can_move)[:num_missing]] = True
        if is_val[of_class].all() or not is_val[of_class].any():
            is_val[of_class] = before[of_class]
    num_moved = int((is_val != before).sum())
    if not num_moved:
        return splits
    logger.info("split: %d images changed sides, so that duplicates are on one", num_moved)
    # In one order, whichever side they come from: the next run finds them in their source's.
    order = sorted(
        range(len(pool)), key=lambda index: (pool[index].label, pool[index].labels, pool[index].key)
    )
    train, val = (
        tuple(pool[index] for index in order if is_val[index] == side) for side in (False, True)
    )
    return replace(splits, train=train, val=val)


def _fill_val(
    labels: Labels,
    before: npt.NDArray[np.bool_],
    is_val: npt.NDArray[np.bool_],
    can_move: npt.NDArray[np.bool_],
    seed: int,
) -> npt.NDArray[np.bool_]:
    """Who of a multi-label pool `[N]` validates: `is_val`, and as many of those that can move as each label in `labels` `[N,C]` lost."""
    counted = np.column_stack([np.ones(len(labels), np.int64), labels])
    in_val = counted[before].sum(axis=0)
    wanted = np.stack([counted.sum(axis=0) - in_val, in_val]).astype(np.float64)

    def fill(
        is_val: npt.NDArray[np.bool_], can_move: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        return np.asarray(
            stratify(labels, wanted, seed=seed, placed=np.where(can_move, -1, is_val)) == 1
        )

    filled = fill(is_val, can_move)
    num_left = labels[filled].sum(axis=0)
    lost = labels[:, (num_left == 0) | (num_left == labels.sum(axis=0))].any(axis=1)
    return fill(np.where(lost, before, is_val), can_move & ~lost) if lost.any() else filled


def _source_of_run(run_dir: Path) -> str | None:
    try:
        options = yaml.safe_load((run_dir / "config.yaml").read_text())
        return source_of(options["data"], Path(options["data_root"]))
    # Whatever lies there, it is no run on these images.
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
