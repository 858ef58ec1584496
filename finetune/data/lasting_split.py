"""A split that lasts: images stay where an earlier run had them, duplicates on one side."""

from __future__ import annotations

import contextlib
import csv
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from finetune.data.duplicates import Duplicates, find_duplicates, open_grids
from finetune.data.splits import KeptSplit, Sample, Splits, load_splits
from models.sources import SplitName, identify_source

logger = logging.getLogger("graft.split")

_SIDES: dict[str, SplitName] = {"train": "train", "val": "val"}


def load_lasting_splits(
    data: str,
    *,
    data_root: Path,
    val_fraction: float,
    seed: int,
    runs_dir: Path | None,
    cache_dir: Path | None,
    num_workers: int,
    check: bool = True,
    strict: bool = False,
    restore: Callable[[Splits], Splits | None] | None = None,
    refuse: Callable[[Splits], None] = lambda splits: None,
) -> tuple[Splits, Duplicates]:
    """The images of `--data`, split, and which of them are copies.

    `check` and `strict` are as in load_splits.

    Where Graft draws the split, images stay where the newest run on them in `runs_dir` had them,
    and copies are on one side. None draws anew. Splits that `restore` makes of the loaded ones, a
    resumed run's own, stay as they are. `cache_dir` keeps what copies are recognised by. `refuse`
    may raise GraftError before any image is read.
    """
    kept = None if runs_dir is None else find_kept_split(data, data_root, runs_dir)
    splits = load_splits(
        data,
        data_root=data_root,
        val_fraction=val_fraction,
        seed=seed,
        kept=kept,
        check=check,
        strict=strict,
    )
    restored = None if restore is None else restore(splits)
    splits = restored or splits
    refuse(splits)
    with contextlib.ExitStack() as stack:
        cache = None if cache_dir is None else stack.enter_context(open_grids(cache_dir))
        duplicates = find_duplicates(splits, num_workers=num_workers, cache=cache)
    if restored is not None:
        return restored, duplicates
    return keep_together(splits, duplicates.groups, kept, seed=seed), duplicates


def find_kept_split(data: str, data_root: Path, runs_dir: Path) -> KeptSplit | None:
    """The split of the newest run in `runs_dir` on the same source of images, if there is one."""
    source = identify_source(data, data_root)
    # By time, not by name: a run's folder begins with the name of its model.
    written = ((path.stat().st_mtime_ns, path) for path in runs_dir.glob("*/splits.csv"))
    for _, path in sorted(written, reverse=True):
        if _source_of_run(path.parent) != source:
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
        logger.warning("%s is damaged; trying the split of an older run", path)
    return None


def keep_together(
    splits: Splits, groups: Sequence[Sequence[Sample]], kept: KeptSplit | None, *, seed: int
) -> Splits:
    """`splits` with each group of duplicates on one side, if Graft drew the split.

    A group goes to the side where an earlier run had one of it, to train if that was both, so that
    no training image moves into validation; else to train. Other new images make up for what
    validation loses. A class that would be left without images on a side keeps its duplicates where
    they are. Returns the very same object if nothing has to move.
    """
    if not splits.is_drawn:
        return splits
    pool = [*splits.train, *splits.val]
    was_val = np.arange(len(pool)) >= len(splits.train)
    is_val, is_bound = was_val.copy(), np.zeros(len(pool), bool)
    earlier = [None if kept is None else kept.split_of.get(sample.place) for sample in pool]
    places = {id(sample): index for index, sample in enumerate(pool)}
    for group in groups:
        members = [places[id(sample)] for sample in group if id(sample) in places]
        is_bound[members] = True
        if was_val[members].any() and not was_val[members].all():
            sides = {earlier[index] for index in members}
            is_val[members] = "val" in sides and "train" not in sides
    if (is_val == was_val).all():
        return splits
    can_move = ~is_val & ~is_bound & np.array([side is None for side in earlier])
    is_val = splits.task.refill_val(splits.labels(pool), was_val, is_val, can_move, seed)
    num_moved = int((is_val != was_val).sum())
    if not num_moved:
        return splits
    logger.info("split: %d images changed sides, so that duplicates are on one", num_moved)
    # In the order of the labels, as the next run finds them, whichever side they come from.
    order = sorted(range(len(pool)), key=lambda index: (pool[index].label, pool[index].key))
    train, val = (
        tuple(pool[index] for index in order if is_val[index] == side) for side in (False, True)
    )
    return replace(splits, train=train, val=val)


def _source_of_run(run_dir: Path) -> str | None:
    try:
        options = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return identify_source(options["data"], Path(options["data_root"]))
    # Whatever the file holds, the folder is not a run on these images.
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
