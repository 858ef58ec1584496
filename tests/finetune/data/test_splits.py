"""Every source of labelled images gives its splits, and each error names the way out."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import Options
from finetune.data.lasting_split import find_kept_split
from finetune.data.splits import KeptSplit, Sample, Splits, load_splits
from models.errors import GraftError


def load(data: str | Path, **options: Any) -> Splits:
    return load_splits(
        str(data), **{"data_root": Path("nowhere"), "val_fraction": 0.25, "seed": 0, **options}
    )


def write_images(root: Path, counts: dict[str, int]) -> Path:
    """`root/<class>/<n>.png`, each with its own content."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number:02d}.png").write_bytes(f"{name} {number}".encode())
    return root


def labels_of(splits: Splits, samples: tuple[Sample, ...]) -> Counter[str]:
    return Counter(splits.describe(sample) for sample in samples)


def keys_of(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.key for sample in samples]


# The embedded digits.


def test_digits_are_the_handwritten_digits_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    splits = load("digits", val_fraction=0.2)
    assert splits.label_names == tuple("0123456789")
    assert (len(splits.train) + len(splits.val), splits.test) == (1797, ())
    original = load_digits()
    for sample in (*splits.train[:3], *splits.val[:3]):
        index = int(Path(sample.key).stem)
        pixels = np.asarray(Image.open(io.BytesIO(sample.read())))
        assert np.array_equal(pixels[1:-1, 1:-1], original.images[index] * 15)
        assert sample.label == original.target[index]


# Folders of class folders.


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    splits = load(write_images(tmp_path, {"dog": 8, "cat": 40, "emu": 2}))
    assert splits.label_names == ("cat", "dog", "emu")
    assert labels_of(splits, splits.val) == {"cat": 10, "dog": 2, "emu": 1}
    assert labels_of(splits, splits.train) == {"cat": 30, "dog": 6, "emu": 1}
    assert not set(keys_of(splits.train)) & set(keys_of(splits.val))
    assert {sample.read() for sample in splits.train if sample.label == 1} < {
        f"dog {number}".encode() for number in range(8)
    }


def test_the_split_follows_the_seed_and_nothing_else(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"cat": 20, "dog": 20})
    assert load(root, seed=3) == load(root, seed=3)
    assert keys_of(load(root, seed=3).val) != keys_of(load(root, seed=4).val)


@pytest.mark.parametrize(("val_fraction", "num_val"), [(0.001, 1), (0.5, 5), (0.999, 9)])
def test_every_class_keeps_an_image_on_both_sides(
    tmp_path: Path, val_fraction: float, num_val: int
) -> None:
    splits = load(write_images(tmp_path, {"cat": 10, "dog": 10}), val_fraction=val_fraction)
    assert labels_of(splits, splits.val) == {"cat": num_val, "dog": num_val}


def test_nested_folders_belong_to_their_class_and_litter_to_none(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"cat": 4, "dog": 4})
    (root / "cat" / "monday" / "am").mkdir(parents=True)
    (root / "cat" / "monday" / "am" / "x.JPG").touch()
    for litter in ("Thumbs.db", "desktop.ini", ".DS_Store", "._00.png"):
        (root / "cat" / litter).touch()
    (root / "cat" / ".cache").mkdir()
    (root / "cat" / ".cache" / "y.png").touch()
    (root / ".git").mkdir()
    (root / ".git" / "z.png").touch()
    (root / "notes.txt").touch()
    splits = load(root)
    assert splits.label_names == ("cat", "dog")
    keys = keys_of(splits.train) + keys_of(splits.val)
    assert len(keys) == 9
    assert str(root / "cat" / "monday" / "am" / "x.JPG") in keys


def test_a_folder_whose_own_path_is_hidden_is_still_read(tmp_path: Path) -> None:
    splits = load(write_images(tmp_path / ".photos", {"cat": 4, "dog": 4}))
    assert len(splits.train) + len(splits.val) == 8


# Folders with train/ and val/.


def test_train_val_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        write_images(tmp_path / split, {"cat": count, "dog": count})
    splits = load(tmp_path)
    assert [(name, len(samples)) for name, samples in splits.named()] == [
        ("train", 10),
        ("val", 4),
        ("test", 6),
    ]
    assert all("/val/" in key for key in keys_of(splits.val))


@pytest.mark.parametrize("names", [("Train", "Valid"), ("training", "validation")])
def test_other_names_of_the_splits_are_understood(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write_images(tmp_path / name, {"cat": 2, "dog": 2})
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val)) == (4, 4)


def test_a_val_split_is_made_where_there_is_only_train(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 8, "dog": 8})
    write_images(tmp_path / "test", {"cat": 2, "dog": 2})
    splits = load(tmp_path)
    assert [(name, len(samples)) for name, samples in splits.named()] == [
        ("train", 12),
        ("val", 4),
        ("test", 4),
    ]
    assert all("/train/" in key for key in keys_of(splits.val))


# What is wrong with a folder.


@pytest.mark.parametrize(
    ("train", "val", "messages"),
    [
        (
            {"cat": 3, "dog": 1, "emu": 1},
            None,
            [
                "each of the 2 classes 'dog', 'emu' has one image; it needs two or more",
                "add images",
            ],
        ),
        (
            {"cat": 3, "dog": 3, "emu": 3},
            {"cat": 1},
            ["each of the 2 classes 'dog', 'emu' has no image to validate on; add some to val/"],
        ),
        (
            {"cat": 3, "dog": 3},
            {"cat": 1, "emu": 1, "fox": 1},
            [
                "each of the 2 classes 'emu', 'fox' has no image to train on; add some to train/",
                "; class 'dog' has no image to validate on",
            ],
        ),
        (
            {"cat": 3, **{f"c{number:02d}": 1 for number in range(25)}},
            None,
            ["each of the 25 classes 'c00', 'c01'", "'c19' and 5 more has one image"],
        ),
    ],
)
def test_small_classes_are_all_in_one_message(
    tmp_path: Path, train: dict[str, int], val: dict[str, int] | None, messages: list[str]
) -> None:
    root = write_images(tmp_path if val is None else tmp_path / "train", train)
    if val is not None:
        write_images(tmp_path / "val", val)
        root = tmp_path
    with pytest.raises(GraftError) as raised:
        load(root)
    for message in messages:
        assert message in str(raised.value)


@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.9])
def test_a_label_with_one_image_stays_in_train(tmp_path: Path, val_fraction: float) -> None:
    """Also where images have several labels."""
    write_images(tmp_path, {"a": 8})
    alone = [f"{number}" for number in range(4)]
    rows = [f"a/{number:02d}.png,{number if number < 4 else ''}" for number in range(8)]
    path = write_csv(tmp_path / "list.csv", "\n".join(["path,labels", *rows]))
    splits = load(path, val_fraction=val_fraction, check=False)
    assert labels_of(splits, splits.train) >= Counter(alone)
    write_images(tmp_path / "folders", {"cat": 4, "dog": 1})
    splits = load(tmp_path / "folders", val_fraction=val_fraction, check=False)
    assert labels_of(splits, splits.train)["dog"] == 1


def test_a_class_with_a_text_alone_has_no_image(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 3, "dog": 3, "emu": 1, "fox": 0, "bird": 0})
    (tmp_path / "bird" / "readme.txt").write_text("birds")
    Image.new("L", (9, 9)).save(tmp_path / "fox" / "picture", "PNG")
    with pytest.raises(GraftError) as raised:
        load(tmp_path)
    assert str(raised.value) == (
        f"--data {tmp_path}: class 'bird' has no image, only a file that is none "
        f"({tmp_path}/bird/readme.txt); add images, or take the class out; each of the 2 classes "
        "'emu', 'fox' has one image; it needs two or more, one of them to validate on: add images, "
        "or take the class out"
    )


@pytest.mark.parametrize("has_earlier_run", [False, True])
def test_a_new_split_is_offered_where_an_earlier_run_had_one(
    tmp_path: Path, has_earlier_run: bool
) -> None:
    write_images(tmp_path, {"cat": 4, "dog": 4})
    first = load(tmp_path)
    split_of = {sample.place: name for name, samples in first.named() for sample in samples}
    kept = KeptSplit(tmp_path / "splits.csv", split_of) if has_earlier_run else None
    splits = load(tmp_path, kept=kept)
    with pytest.raises(GraftError, match="class 'dog' has no image to validate on") as raised:
        splits.without([sample.key for sample in splits.val if splits.describe(sample) == "dog"])
    assert ("or say --new-split: an earlier run had it" in str(raised.value)) is has_earlier_run


def test_what_is_seen_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for split in ("Training_Set", "dev"):
        write_images(tmp_path / split, {"cat": 2, "dog": 2})
    load(tmp_path)
    assert caplog.messages == [f"{tmp_path}: 2 classes, images: 4 train, 4 val; classes: cat, dog"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no class folders in it; put the images of each class in a folder"),
        ({"cat": 0, "dog": 0}, "there is no image in it"),
        ({"cat": 3}, "only one class, 'cat'; a classifier needs two or more"),
        ({"cat": 3, "dog": 1}, "class 'dog' has one image; it needs two or more"),
    ],
)
def test_a_folder_that_cannot_be_learned_from_is_refused(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    root = write_images(tmp_path / "photos", counts)
    root.mkdir(exist_ok=True)
    with pytest.raises(GraftError, match=f"^--data {root}: .*{message}"):
        load(root)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (
            {"cat": 3, "dog": 3},
            {"cat": 3},
            "class 'dog' has no image to validate on; add some to val/",
        ),
        (
            {"cat": 3},
            {"cat": 3, "dog": 3},
            "class 'dog' has no image to train on; add some to train/",
        ),
        ({"cat": 3, "dog": 0}, {"cat": 3, "dog": 1}, "class 'dog' has no image to train on"),
        ({"cat": 3}, {"cat": 1}, "only one class"),
        ({}, {"cat": 1}, "no class folders"),
    ],
)
def test_a_class_that_is_missing_in_a_split_is_named(
    tmp_path: Path, train: dict[str, int], val: dict[str, int], message: str
) -> None:
    for name, counts in (("train", train), ("val", val)):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, counts)
    with pytest.raises(GraftError, match=message):
        load(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        GraftError, match="there is no such file or folder; or say digits, or torchvision:NAME"
    ):
        load(tmp_path / "photos")


def test_what_the_system_refuses_is_said_in_words() -> None:
    with pytest.raises(
        GraftError, match=f"^--data {'x' * 80}: it cannot be read: File name too long$"
    ):
        load("x" * 5000)


def test_class_folders_without_a_file_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {"cat": 3, "dog": 3, "emu": 0, "fox": 0})
    (tmp_path / "fox" / ".DS_Store").touch()
    splits = load(tmp_path)
    assert splits.label_names == ("cat", "dog")
    assert caplog.messages == [
        f"{tmp_path}: 2 classes, images: 4 train, 2 val; classes: cat, dog; left out or to be "
        "looked at: no file in the class folders emu, fox"
    ]
    assert caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize(
    "counts", [{"Cat": 4, "cat": 4, "dog": 4}, {"train/cat": 2, "train/Cat": 2, "val/cat": 2}]
)
def test_names_that_differ_by_case_alone_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, counts: dict[str, int]
) -> None:
    load(write_images(tmp_path, counts), check=False)
    assert "names that differ by case alone (Cat and cat): give them one spelling" in caplog.text


def test_a_class_spelt_otherwise_in_val_is_named_in_the_error(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/cat": 2, "train/dog": 2, "val/Cat": 2, "val/dog": 2})
    with pytest.raises(
        GraftError, match=r"class 'Cat' has no image to train on.*case alone \(Cat and cat\)"
    ):
        load(tmp_path)


# CSV files.


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    for name in ("a.png", "b.png", "c.png", "d.png", "a,1.png", 'd "q".png', *"1234567"):
        (path.parent / name).touch()
    return path


def test_a_csv_without_splits_is_split(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 4, "b": 4})
    rows = "".join(
        f"{name}/{number:02d}.png,{name.upper()}\n" for name in "ab" for number in range(4)
    )
    splits = load(write_csv(tmp_path / "list.csv", f"path,label\n{rows}"))
    assert splits.label_names == ("A", "B")
    assert (len(splits.train), len(splits.val)) == (6, 2)
    # Paths are relative to the file, and stand as they were written in messages.
    assert {sample.key: sample.read() for sample in (*splits.train, *splits.val)}[
        "a/02.png"
    ] == b"a 2"


def test_a_csv_with_splits_in_any_order_of_columns_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = ["Train,x,,1", "training,y,,2", "val,x,,3", "VALID,y,,4", "test,ü,,5", "train,ü,,6"]
    text = "\r\n".join(["split,label,note,path", *rows, "val,ü,,7", ""])
    splits = load(write_csv(tmp_path / "list.csv", text, "utf-8-sig"))
    assert splits.label_names == ("x", "y", "ü")
    assert [(name, keys_of(samples)) for name, samples in splits.named()] == [
        ("train", ["1", "2", "6"]),
        ("val", ["3", "4", "7"]),
        ("test", ["5"]),
    ]


def test_spaces_around_a_label_make_no_other_class(tmp_path: Path) -> None:
    splits = load(
        write_csv(tmp_path / "list.csv", "path,label\na.png,x\nb.png, x\nc.png,y,\nd.png,y \n")
    )
    assert splits.label_names == ("x", "y")


def test_quoted_paths_with_commas_are_read(tmp_path: Path) -> None:
    splits = load(
        write_csv(
            tmp_path / "list.csv", 'path,label\n"a,1.png",x\nb.png,x\nc.png,y\n"d ""q"".png",y\n'
        )
    )
    assert {"a,1.png", 'd "q".png'} <= set(keys_of(splits.train) + keys_of(splits.val))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it needs the columns path,label and perhaps split; it has none"),
        ("path,label\n", "there is no image in it"),
        (
            "file,class\na.png,x\n",
            "it needs the columns path,label and perhaps split; it has file, class",
        ),
        (
            "path;label\na.png;x\n",
            "it has 'path;label', separated by semicolons; save it separated by commas",
        ),
        ("path\tlabel\na.png\tx\n", "separated by tabs; save it separated by commas"),
        (
            "path, label\na.png, x\n",
            "it has 'path', ' label'; write them in small letters, without spaces around them",
        ),
        (
            "Path,Label,Split\na.png,x,train\n",
            "it has 'Path', 'Label', 'Split'; write them in small letters",
        ),
        ("path,label\na.png,x\n,y\n", "line 3 has no path"),
        ("path,label\na.png,x\nb.png,\n", "line 3 has no label"),
        ("path,label\na.png\n", "line 2 has no label"),
        ("path,label\na.png,x\nb.png, \n", "line 3 has no label"),
        (
            "path,label\na.png,x\nb.png,salt, pepper\n",
            "line 3 has 3 cells, the first line 2; put a path or label with a comma",
        ),
        ("path,label,label\na.png,x,y\n", "it has the column label more than once"),
        ("path,label\na.png,x\nb\0.png,x\n", "line 3 has a path with a NUL in it"),
        (
            "path,label,split\na.png,x,train\nb.png,x,extra\n",
            "line 3 has the split 'extra'; allowed are train, val and test",
        ),
        ("path,label,split\na.png,x,train\nb.png,x\n", "line 3 has the split None; allowed"),
        ("path,label,split\na.png,x,train\nb.png,x,\n", "line 3 has the split ''"),
        (
            "path,label,split\na.png,x,train\nb.png,y,train\nc.png,x,val\n",
            "class 'y' has no image to validate on",
        ),
        ("path,label\na.png,x\nb.png,x\n", "only one class, 'x'"),
    ],
)
def test_what_is_wrong_in_a_csv_is_said_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write_csv(tmp_path / "list.csv", text)
    with pytest.raises(GraftError, match=f"--data {path}: .*({message})"):
        load(path)


def test_a_line_number_counts_lines_of_the_file(tmp_path: Path) -> None:
    """As an editor shows them: a quoted line break and a blank line are lines, too."""
    path = write_csv(tmp_path / "list.csv", 'path,label\n"a\nb.png",x\n\nc.png,\n')
    with pytest.raises(GraftError, match="line 5 has no label"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00\xd8" * 20,
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"path,label\n\xff.png,x\n",
    ],
)
def test_a_file_that_is_no_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    with pytest.raises(GraftError, match=f"--data {path}: "):
        load(path)


# splits.csv.


@pytest.mark.parametrize(
    ("encoding", "found"), [("utf-16", "text in UTF-16"), ("latin-1", "not text in UTF-8")]
)
def test_a_csv_in_another_encoding_is_told_how_to_save_it(
    tmp_path: Path, encoding: str, found: str
) -> None:
    path = write_csv(tmp_path / "list.csv", "path,label\nvögel.png,x\n", encoding)
    with pytest.raises(
        GraftError,
        match=f"^--data {path}: it is {found}; save it as CSV in UTF-8, separated by commas$",
    ):
        load(path)


def test_splits_csv_reads_back_as_the_same_splits(tmp_path: Path) -> None:
    splits = load(write_images(tmp_path / "photos", {"cat": 6, 'odd, "name"': 6}))
    splits.write_csv(tmp_path / "splits.csv")
    again = load(tmp_path / "splits.csv", seed=99)
    assert again == splits
    assert [sample.read() for sample in again.val] == [sample.read() for sample in splits.val]


@pytest.mark.parametrize("name", [b"\xff.png", b"1 ", b" 1.png", b"a\n1.png", b"00.png "])
def test_splits_csv_reads_back_whatever_files_are_called(tmp_path: Path, name: bytes) -> None:
    write_images(tmp_path / "photos", {"cat": 6, "dog": 6})
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "photos" / "cat") + b"/" + name))
    odd.write_bytes(b"odd")
    splits = load(tmp_path / "photos")
    splits.write_csv(tmp_path / "splits.csv")
    again = load(tmp_path / "splits.csv")
    assert again == splits
    assert b"odd" in {sample.read() for sample in (*again.train, *again.val)}


@pytest.mark.parametrize(
    "content",
    [b"path,label\n\xff.png,v\xf6gel\n", b"path,label,\xff\n\xff.png,x,\n", b"p\xffth,label\n"],
)
def test_bytes_that_are_no_text_are_read_in_paths_alone(tmp_path: Path, content: bytes) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(GraftError, match="it is not text in UTF-8; save it as CSV in UTF-8"):
        load(tmp_path / "list.csv")


def test_splits_csv_has_names_that_are_no_text(tmp_path: Path) -> None:
    """And a later run finds its images by them."""
    write_images(tmp_path / "photos", {"cat": 6, "dog": 6})
    odd = os.fsdecode(os.fsencode(tmp_path / "photos" / "cat") + b"/\xff.png")
    (tmp_path / "photos" / "cat" / "00.png").rename(odd)
    splits = load(tmp_path / "photos")
    run_dir = tmp_path / "runs" / "photos-1"
    run_dir.mkdir(parents=True)
    options = Options(data=str(tmp_path / "photos"), output=tmp_path / "runs")
    (run_dir / "config.yaml").write_text(options.to_yaml())
    splits.write_csv(run_dir / "splits.csv")
    kept = find_kept_split(options.data, options.data_root, options.output)
    assert kept is not None
    assert kept.split_of[odd] == ("train" if odd in keys_of(splits.train) else "val")


def test_splits_csv_lists_every_sample_once(tmp_path: Path) -> None:
    splits = load("digits")
    splits.write_csv(tmp_path / "splits.csv")
    with (tmp_path / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 1797
    assert Counter(row["split"] for row in rows) == {
        "train": len(splits.train),
        "val": len(splits.val),
    }


# Leaving out what cannot be read.


def test_unreadable_samples_are_left_out(tmp_path: Path) -> None:
    splits = load(write_images(tmp_path, {"cat": 8, "dog": 8}))
    gone = [splits.train[0].key, splits.val[-1].key]
    kept = splits.without(gone)
    assert keys_of(kept.train) == keys_of(splits.train)[1:]
    assert keys_of(kept.val) == keys_of(splits.val)[:-1]
    assert splits.without([]) == splits


@pytest.mark.parametrize(
    ("split", "message"), [("train", "no image to train on"), ("val", "no image to validate on")]
)
def test_a_class_that_loses_its_last_image_is_named(
    tmp_path: Path, split: str, message: str
) -> None:
    splits = load(write_images(tmp_path, {"cat": 8, "dog": 8}))
    gone = [sample.key for sample in getattr(splits, split) if sample.label == 1]
    with pytest.raises(
        GraftError, match=f"after leaving out unreadable images: class 'dog' has {message}"
    ):
        splits.without(gone)


# torchvision's data sets.


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FashionMNIST as its files lie on a disk, with 40 and 20 images of noise."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        raw = root / "FashionMNIST" / "raw"
        write_idx(raw / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    return root


def test_a_torchvision_data_set_is_found_under_the_data_root(fashion_root: Path) -> None:
    splits = load("torchvision:FashionMNIST", data_root=fashion_root)
    assert set(splits.label_names) >= {"Ankle boot", "T-shirt/top", "Trouser"}
    # Its own test split stays one; validation is a share of its training split.
    assert [(name, len(samples)) for name, samples in splits.named()] == [
        ("train", 30),
        ("val", 10),
        ("test", 20),
    ]
    raw = (fashion_root / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    sample = splits.test[3]
    assert splits.describe(sample) == "Dress"
    assert sample.key == "torchvision:FashionMNIST/test/3"
    assert np.asarray(Image.open(io.BytesIO(sample.read()))).tobytes() == raw[3 * 784 : 4 * 784]


@pytest.mark.parametrize("name", ["FashionMIST", "", "VisionDataset2", "utils", "__name__"])
def test_an_unknown_torchvision_name_is_refused(name: str) -> None:
    with pytest.raises(
        GraftError,
        match=rf"--data torchvision:{name}: torchvision has no such data set; for example Fashion",
    ):
        load(f"torchvision:{name}")


@pytest.mark.parametrize("name", ["FashionMNIST", "OxfordIIITPet"])
def test_a_torchvision_data_set_without_files_and_network_is_an_error_with_a_way_out(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(
        GraftError,
        match=rf"--data torchvision:{name}: it is not under --data-root .* and could not be "
        r"downloaded \(.+\); run",
    ):
        load(f"torchvision:{name}", data_root=tmp_path)


@pytest.mark.parametrize("strict", [True, False])
def test_a_folder_that_cannot_be_read_stops_a_strict_run(
    tmp_path: Path, strict: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {"cat": 4, "cat/private": 4, "dog": 4})
    scandir = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if path.name == "private":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = "folders that cannot be read: cat/private (Permission denied)"
    if strict:
        with pytest.raises(GraftError, match=re.escape(f"{message}; make them readable")):
            load(tmp_path, strict=True)
    else:
        assert len(load(tmp_path).train) == 6
        assert message in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FakeData", "it is made without files, and Graft gives"),
        ("VisionDataset", "torchvision has no such data set"),
        ("ImageFolder", "it is a reader of class folders; say --data FOLDER"),
        ("DatasetFolder", "it is a reader of class folders; say --data FOLDER"),
        ("EMNIST", "it needs split too, and Graft gives"),
        ("CocoDetection", "it needs annFile too"),
        ("CocoCaptions", "it needs annFile too"),
        ("Flickr8k", "it needs ann_file too"),
        ("PhotoTour", "it needs name too"),
        ("Kinetics", "it needs frames_per_clip too"),
        ("UCF101", "it needs annotation_path, frames_per_clip too"),
        ("HMDB51", "it needs annotation_path, frames_per_clip too"),
        ("Cityscapes", "and torchvision does not download it; put its files there"),
        ("FlyingChairs", "and torchvision does not download it; put its files there"),
        ("CREStereo", "and torchvision does not download it; put its files there"),
        ("FER2013", "and torchvision does not download it; put its files there"),
        ("LFWPeople", "could not be downloaded"),
        ("StanfordCars", "could not be downloaded"),
    ],
)
def test_a_torchvision_data_set_that_cannot_be_read_is_an_error_in_words(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(GraftError, match=f"^--data torchvision:{name}: .*{message}"):
        load(f"torchvision:{name}", data_root=tmp_path)


def test_a_torchvision_data_set_without_class_numbers_is_an_error_in_words(
    tmp_path: Path,
) -> None:
    pairs = tmp_path / "FlyingChairs" / "data"
    pairs.mkdir(parents=True)
    for end in ("img1.ppm", "img2.ppm"):
        Image.new("RGB", (8, 8)).save(pairs / f"00001_{end}")
    (pairs / "00001_flow.flo").write_bytes(struct.pack("<fii", 202021.25, 8, 8) + bytes(512))
    (tmp_path / "FlyingChairs" / "FlyingChairs_train_val.txt").write_text("1\n1\n")
    with pytest.raises(GraftError, match=r"its images have no class numbers .*; write its images"):
        load("torchvision:FlyingChairs", data_root=tmp_path)
