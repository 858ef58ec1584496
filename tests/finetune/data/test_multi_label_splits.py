"""A CSV of images with any number of labels: how it is read, split and kept; its errors."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from finetune.config import SharedOptions
from finetune.data.lasting_split import keep_together
from finetune.data.splits import KeptSplit, Sample, Splits, load_splits
from finetune.tasks.multi_label import MULTI_LABEL
from models.errors import GraftError
from tests.finetune.data.test_lasting_split import load_lasting, sides, write_run


def write_csv(path: Path, rows: Sequence[tuple[str, ...]], header: str = "path,labels") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    for name, *_ in rows:
        if name and not (path.parent / name).exists():
            (path.parent / name).write_bytes(name.encode())
    return path


def load(path: Path, *, kept: KeptSplit | None = None, seed: int = 0) -> Splits:
    return load_splits(str(path), data_root=path.parent, val_fraction=0.2, seed=seed, kept=kept)


def draw_rows(count: int, first: int = 0) -> list[tuple[str, str]]:
    """Half the images have a cat, a quarter a dog, every eighth an emu, and some none of them."""
    rows = []
    for index in range(first, first + count):
        names = [
            name
            for name, every in (("cat", 2), ("dog", 4), ("emu", 8))
            if np.random.default_rng((every, index)).random() < 1 / every
        ]
        rows.append((f"{index}.png", "|".join(names)))
    return rows


def test_names_are_taken_apart(tmp_path: Path) -> None:
    rows = [
        ("a.png", "dog|cat", "train"),
        ("b.png", "", "train"),
        ("c.png", " cat | cat |", "val"),
        ("d.png", "dog", "validation"),
    ]
    splits = load(write_csv(tmp_path / "list.csv", rows, "path,labels,split"))
    assert splits.label_names == ("cat", "dog")
    assert [sample.label for sample in (*splits.train, *splits.val)] == [(0, 1), (), (0,), (1,)]
    assert splits.labels(splits.train).tolist() == [[1, 1], [0, 0]]
    assert [splits.describe(sample) for sample in splits.train] == ["cat|dog", ""]
    assert splits.count_labels(splits.train).tolist() == [1, 1]


def test_what_was_read_is_written_and_read_again(tmp_path: Path) -> None:
    splits = load(write_csv(tmp_path / "list.csv", draw_rows(60)))
    splits.write_csv(tmp_path / "splits.csv")
    with (tmp_path / "splits.csv").open() as file:
        assert csv.DictReader(file).fieldnames == ["path", "labels", "split"]
    again = load(tmp_path / "splits.csv")
    assert again.label_names == splits.label_names
    for split in ("train", "val"):
        before, after = getattr(splits, split), getattr(again, split)
        assert [(sample.place, sample.label) for sample in before] == [
            (sample.place, sample.label) for sample in after
        ]


def test_a_drawn_split_shares_every_label(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "list.csv", draw_rows(400))
    splits = load(path)
    everything = splits.count_labels([*splits.train, *splits.val])
    val = splits.count_labels(splits.val)
    assert len(splits.val) == 80
    assert all(abs(val[label] - 0.2 * everything[label]) <= 1 for label in range(3))
    assert sides(load(path)) == sides(splits) != sides(load(path, seed=1))


def test_images_stay_on_their_side_as_the_list_grows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(150):
        (tmp_path / f"{index}.png").write_bytes(str(index).encode())
    path = write_csv(tmp_path / "list.csv", draw_rows(100))
    options = SharedOptions(
        data=str(path), output=tmp_path / "runs", cache_dir=tmp_path / "cache", workers=1
    )
    first, _ = load_lasting(options)
    write_run(first, options, "list-1", 1)
    write_csv(path, draw_rows(150))
    with caplog.at_level("INFO", "graft"):
        grown, _ = load_lasting(options.model_copy(update={"seed": 5}))
    assert sides(first).items() <= sides(grown).items()
    assert len(grown.val) == 30
    assert "split: 100 images stay where" in caplog.messages[0]


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_on_one_side_and_others_make_up_for_them(tmp_path: Path, seed: int) -> None:
    splits = load(write_csv(tmp_path / "list.csv", draw_rows(200)), seed=seed)
    groups = [(splits.train[index], splits.val[index]) for index in range(8)]
    moved = keep_together(splits, groups, None, seed=seed)
    assert all(sides(moved)[one.key] == sides(moved)[other.key] == "train" for one, other in groups)
    before, after = splits.count_labels(splits.val), splits.count_labels(moved.val)
    assert len(moved.val) == len(splits.val)
    assert all(abs(before[label] - after[label]) <= 1 for label in range(3))
    was = KeptSplit(tmp_path / "splits.csv", {sample.place: "val" for _, sample in groups})
    kept = keep_together(splits, groups, was, seed=seed)
    assert all(sides(kept)[sample.key] == "val" for group in groups for sample in group)


def test_a_label_whose_images_are_all_copies_keeps_them_on_both_sides() -> None:
    def draw(split: str, *labels: tuple[int, ...]) -> tuple[Sample, ...]:
        return tuple(
            Sample(f"{split} {index}", each, Path(f"{split}{index}"))
            for index, each in enumerate(labels)
        )

    train, val = draw("train", (0,), (1,), (1,), ()), draw("val", (0,), (1,))
    splits = Splits(("a", "b"), train, val, is_drawn=True, task=MULTI_LABEL)
    assert keep_together(splits, [(train[0], val[0])], None, seed=0) is splits


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "path,label,labels",
            [("a.png", "x", "x")],
            "it has both label and labels; keep label for one an image",
        ),
        (
            "path,tags",
            [("a.png", "x")],
            "it has path, tags .where images have several labels, path,labels",
        ),
        ("path,labels", [("", "x")], "line 2 has no path"),
        (
            "path,labels",
            [("a.png", ""), ("b.png", "|")],
            "no image has a label; the column labels takes names with | between them",
        ),
        (
            "path,labels",
            [("a.png", "x"), ("b.png", "x"), ("c.png", "x")],
            "every image to train on has the label 'x'",
        ),
        (
            "path,labels",
            [("a.png", "x|y"), ("b.png", "y"), ("c.png", "y"), ("d.png", "")],
            "class 'x' has one image; it needs two or more",
        ),
        (
            "path,labels,split",
            [("a.png", "x", "train"), ("b.png", "", "train"), ("c.png", "", "val")],
            "class 'x' has no image to validate on",
        ),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, header: str, rows: list[tuple[str, ...]], message: str
) -> None:
    path = write_csv(tmp_path / "list.csv", rows, header)
    with pytest.raises(GraftError) as raised:
        load(path)
    assert message.replace(".where", "(where") in str(raised.value)
