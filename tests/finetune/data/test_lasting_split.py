"""A split lasts: images stay where an earlier run had them, and duplicates stay on one side."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.config import SharedOptions
from finetune.data.duplicates import Duplicates
from finetune.data.lasting_split import find_kept_split, keep_together, load_lasting_splits
from finetune.data.splits import KeptSplit, Splits
from tests.finetune.data.test_splits import write_images


def options_of(data: Path, output: Path, **changes: object) -> SharedOptions:
    return SharedOptions(data=str(data), output=output, **changes)


def write_run(splits: Splits, options: SharedOptions, name: str, time: int) -> Path:
    """What a run leaves that a later one goes by."""
    run_dir = options.output / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(options.to_yaml())
    splits.write_csv(run_dir / "splits.csv")
    os.utime(run_dir / "splits.csv", (time, time))
    return run_dir / "splits.csv"


def load_lasting(options: SharedOptions) -> tuple[Splits, Duplicates]:
    """As a program loads them."""
    return load_lasting_splits(
        options.data,
        data_root=options.data_root,
        val_fraction=options.val_fraction,
        seed=options.seed,
        runs_dir=None if options.new_split else options.output,
        cache_dir=options.cache_dir if options.cache else None,
        num_workers=options.workers,
    )


def sides(splits: Splits) -> dict[str, str]:
    return {sample.key: split for split, samples in splits.named() for sample in samples}


def val_per_class(splits: Splits) -> Counter[str]:
    return Counter(splits.describe(sample) for sample in splits.val)


def grow(root: Path, name: str, numbers: Sequence[int]) -> None:
    for number in numbers:
        (root / name / f"{number:02d}.png").write_bytes(f"{name} {number}".encode())


# Kept from run to run.


@pytest.mark.parametrize("seed", range(5))
def test_images_stay_on_their_side_as_the_folder_grows(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_images(tmp_path / "photos", {"cat": 10, "dog": 10})
    options = options_of(root, tmp_path / "runs", seed=seed)
    first = load_lasting(options)[0]
    path = write_run(first, options, "photos-1", 1)
    grow(root, "cat", range(10, 40))
    (root / "emu").mkdir()
    grow(root, "emu", range(5))
    with caplog.at_level("INFO", "graft"):
        grown, _ = load_lasting(options.model_copy(update={"seed": seed + 1}))
    assert {key: side for key, side in sides(grown).items() if key in sides(first)} == sides(first)
    # The new ones make up each class's share: 8 of 40 cats, 1 of 5 emus.
    assert val_per_class(grown) == {"cat": 8, "dog": 2, "emu": 1}
    assert [line for line in caplog.messages if line.startswith("split:")] == [
        f"split: 20 images stay where {path} has them; new: 28 to train, 7 to val "
        "(--new-split draws anew)"
    ]


def test_growing_one_image_at_a_time_keeps_the_share(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos", {"cat": 4, "dog": 4})
    options = options_of(root, tmp_path / "runs")
    before: dict[str, str] = {}
    for number in range(4, 24):
        splits, _ = load_lasting(options)
        assert before.items() <= sides(splits).items()
        before = sides(splits)
        write_run(splits, options, f"photos-{number}", number)
        grow(root, "cat", [number])
    assert val_per_class(splits) == {"cat": 5, "dog": 1}


def test_images_that_went_away_change_nothing_for_the_others(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos", {"cat": 10, "dog": 10})
    options = options_of(root, tmp_path / "runs")
    first, _ = load_lasting(options)
    write_run(first, options, "photos-1", 1)
    for key in (first.train[0].key, first.train[1].key, first.val[-1].key):
        Path(key).unlink()
    second, _ = load_lasting(options)
    assert sides(second).items() < sides(first).items()


def test_the_newest_run_on_the_same_images_is_kept(tmp_path: Path) -> None:
    root, other = (
        write_images(tmp_path / name, {"cat": 10, "dog": 10}) for name in ("photos", "other")
    )
    output = tmp_path / "runs"
    for time, (data, seed) in enumerate([(root, 1), (root, 2), (other, 3)], start=1):
        options = options_of(data, output, seed=seed, new_split=True)
        write_run(load_lasting(options)[0], options, f"z{9 - time}", time)
    (output / "not-a-run").mkdir()
    (output / "not-a-run" / "splits.csv").write_text("path,label,split\n")
    kept = find_kept_split(str(root), Path("data"), output)
    assert kept is not None
    assert kept.path == output / "z7" / "splits.csv"


def test_a_run_on_a_relative_path_is_found_from_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "photos", {"cat": 10, "dog": 10})
    monkeypatch.chdir(tmp_path)
    options = options_of(Path("photos"), Path("runs"), seed=4)
    first, _ = load_lasting(options)
    write_run(first, options, "photos-1", 1)
    again, _ = load_lasting(options_of(root, tmp_path / "runs"))
    assert [sample.place for sample in again.val] == [sample.place for sample in first.val]


def test_new_split_draws_anew(tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos", {"cat": 10, "dog": 10})
    options = options_of(root, tmp_path / "runs", seed=1)
    write_run(load_lasting(options)[0], options, "photos-1", 1)
    anew = options_of(root, tmp_path / "runs", seed=2, new_split=True)
    splits, _ = load_lasting(anew)
    assert sides(splits) == sides(load_lasting(options_of(root, tmp_path / "elsewhere", seed=2))[0])
    # It is asked for once: a run's options, read back, do not ask again.
    assert "\nnew_split:" not in anew.to_yaml()


@pytest.mark.parametrize("damage", ["", "path,label\na,b\n", "path,label,split\n\0,", "\xff"])
def test_a_damaged_split_gives_way_to_an_older_one(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_images(tmp_path / "photos", {"cat": 10, "dog": 10})
    options = options_of(root, tmp_path / "runs", seed=1)
    first, _ = load_lasting(options)
    write_run(first, options, "older", 1)
    newer = write_run(first, options, "newer", 2)
    newer.write_text(damage, encoding="latin-1")
    with caplog.at_level("WARNING", "graft"):
        splits, _ = load_lasting(options_of(root, tmp_path / "runs", seed=2))
    assert sides(splits) == sides(first)
    assert caplog.messages == [f"{newer} is damaged; trying the split of an older run"]


def test_a_source_with_splits_of_its_own_keeps_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "photos" / split, {"cat": 4, "dog": 4})
    options = options_of(tmp_path / "photos", tmp_path / "runs")
    splits, _ = load_lasting(options)
    assert not splits.is_drawn
    moved = Splits(splits.label_names, splits.val, splits.train)
    write_run(moved, options, "photos-1", 1)
    assert sides(load_lasting(options)[0]) == sides(splits)


# Duplicates on one side.


def drawn(tmp_path: Path, counts: dict[str, int]) -> Splits:
    return load_lasting(options_of(write_images(tmp_path / "photos", counts), tmp_path / "runs"))[0]


def is_on_one_side(splits: Splits, keys: Sequence[str]) -> bool:
    return len({sides(splits)[key] for key in keys}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_of_a_new_split_go_to_train_and_others_make_up_for_them(
    tmp_path: Path, seed: int
) -> None:
    splits = drawn(tmp_path, {"cat": 20, "dog": 20})
    groups = [(*splits.train[:2], splits.val[0]), (splits.train[-1], splits.val[-1])]
    together = keep_together(splits, groups, None, seed=seed)
    for group in groups:
        assert {sides(together)[sample.key] for sample in group} == {"train"}
    assert val_per_class(together) == {"cat": 4, "dog": 4}
    assert sides(together).keys() == sides(splits).keys()
    assert together == keep_together(splits, groups, None, seed=seed)


def test_splits_without_duplicates_across_stay_the_same_object(tmp_path: Path) -> None:
    splits = drawn(tmp_path, {"cat": 20, "dog": 20})
    assert keep_together(splits, [splits.train[:2], splits.val[:2]], None, seed=0) is splits


def test_a_new_duplicate_goes_where_the_earlier_run_had_it(tmp_path: Path) -> None:
    splits = drawn(tmp_path, {"cat": 20, "dog": 20})
    (old_train, new_train), (old_val, new_val) = splits.train[:2], splits.val[:2]
    split_of = {
        sample.place: split
        for split, samples in splits.named()
        for sample in samples
        if sample not in (new_train, new_val)
    }
    together = keep_together(
        splits,
        [(old_train, new_val), (new_train, old_val)],
        KeptSplit(Path("splits.csv"), split_of),
        seed=0,
    )
    assert sides(together)[old_train.key] == sides(together)[new_val.key] == "train"
    assert sides(together)[old_val.key] == sides(together)[new_train.key] == "val"


def test_no_training_image_of_an_earlier_run_moves_into_validation(tmp_path: Path) -> None:
    """Duplicates that the earlier run had on both sides end in train."""
    splits = drawn(tmp_path, {"cat": 20, "dog": 20})
    split_of = {sample.place: split for split, samples in splits.named() for sample in samples}
    groups = list(zip(splits.train[:2], splits.val[:2], strict=True))
    together = keep_together(splits, groups, KeptSplit(Path("splits.csv"), split_of), seed=0)
    assert {sample.place for sample in splits.train} < {sample.place for sample in together.train}
    assert val_per_class(together) == {"cat": 2, "dog": 4}


def test_a_class_that_would_lose_a_side_keeps_its_duplicates(tmp_path: Path) -> None:
    splits = drawn(tmp_path, {"cat": 2, "dog": 20})
    assert keep_together(splits, [(splits.train[0], splits.val[0])], None, seed=0) is splits


def test_a_split_of_the_source_is_not_touched(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "photos" / split, {"cat": 4, "dog": 4})
    splits, _ = load_lasting(options_of(tmp_path / "photos", tmp_path / "runs"))
    assert keep_together(splits, [(splits.train[0], splits.val[0])], None, seed=0) is splits
