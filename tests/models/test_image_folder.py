"""What a folder means: its splits, its classes, what is left out, and where reading stops."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from models.errors import GraftError
from models.image_folder import (
    ImageFolder,
    check_unicode_forms,
    find_case_twins,
    read_image_folder,
    read_split_name,
)
from tests.support.permissions import as_nobody, make_open_folder


def write(root: Path, *paths: str) -> Path:
    """Two images in each folder; a path that ends in a suffix is one file."""
    for path in paths:
        for file in [path] if Path(path).suffix else [f"{path}/1.jpg", f"{path}/2.jpg"]:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(file.encode())
    return root


def classes(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


def count(found: ImageFolder) -> Counter[str]:
    """Images of each class, by split where there are some."""
    splits: Sequence[str] = found.splits or [""] * len(found.images)
    return Counter(
        f"{split}/{name}".lstrip("/") for split, (name, _) in zip(splits, found.images, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("training_set", "train"),
        ("Training Set", "train"),
        ("train-images", "train"),
        ("trainset", "train"),
        ("seg_train", "train"),
        ("train2017", "train"),
        ("trainval", "train"),
        ("VAL", "val"),
        ("valid", "val"),
        ("validation_data", "val"),
        ("dev", "val"),
        ("devset", "val"),
        ("eval", "val"),
        ("Evaluation", "val"),
        ("test", "test"),
        ("test_set", "test"),
        ("testing", "test"),
        ("hold-out", "test"),
        ("trains", None),
        ("invalid", None),
        ("contest", None),
        ("latest", None),
        ("cat", None),
        ("evaluated", None),
    ],
)
def test_names_of_splits_in_all_usual_spellings(name: str, split: str | None) -> None:
    assert read_split_name(name) == split


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (classes("train", "dev"), {"train", "val"}),
        (classes("train", "eval"), {"train", "val"}),
        (classes("training_set", "test_set"), {"train", "test"}),
        (classes("Train", "Valid", "Test"), {"train", "val", "test"}),
        (classes("seg_train", "seg_test"), {"train", "test"}),
        (classes("train2017", "val2017"), {"train", "val"}),
        ([*classes("train", "val"), "docs/readme.txt"], {"train", "val"}),
    ],
)
def test_splits_are_read_as_splits(tmp_path: Path, paths: list[str], expected: set[str]) -> None:
    found = read_image_folder(write(tmp_path, *paths))
    assert count(found) == {f"{split}/{name}": 2 for split in expected for name in ("cat", "dog")}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["train", "bus", "car"], {"train", "bus", "car"}),
        (["valid", "invalid"], {"valid", "invalid"}),
        (["test", "control"], {"test", "control"}),
        (["dev/2023", "production/2022"], {"dev", "production"}),
        (["cat/images", "dog/images"], {"cat", "dog"}),
    ],
)
def test_a_class_may_be_called_what_a_split_is_called(
    tmp_path: Path, paths: list[str], expected: set[str]
) -> None:
    assert count(read_image_folder(write(tmp_path, *paths))) == dict.fromkeys(expected, 2)


@pytest.mark.parametrize(
    "paths",
    [
        [*classes("cats", "dogs"), "cats/1.jpg"],
        ["cats/left", "cats/right", "dogs/left", "dogs/front"],
        [*(f"cats/{year}" for year in range(2010, 2020)), "dogs/2010", "dogs/2011"],
        ["cats/left", "cats/right", "dogs"],
    ],
)
def test_folders_within_classes_are_parts_of_them(tmp_path: Path, paths: list[str]) -> None:
    assert set(count(read_image_folder(write(tmp_path, *paths)))) == {"cats", "dogs"}


@pytest.mark.parametrize(
    ("paths", "problem", "ways_out"),
    [
        (classes("val", "test"), "there is no train/", ["rename to train/", "if they are classes"]),
        (classes("test_set"), "there is no train/", ["add train/", "if they are classes"]),
        (classes("dev", "devices"), "there is no train/", ["rename", "if they are classes"]),
        (["train", "test"], "no class folders are in them", ["test/cat/1.jpg", "if they are cla"]),
        (["train", "test", "car"], "no class folders are in them", ["If they are splits", "CSV"]),
        (
            classes("train", "other"),
            "other/ has class folders as train/ has",
            ["rename it to val/"],
        ),
        (
            [*classes("train"), "bus"],
            "train/ could be a split or a class beside bus/",
            ["move bus/ out", "if they are classes"],
        ),
        (classes("train", "val", "dev"), "are all names of the split val", ["put their", "rename"]),
        (classes("photos"), "its only folder is photos/", ["say --data {root}/photos"]),
        (classes("a/b/photos"), "its only folder is a/", ["say --data {root}/a/b/photos"]),
        (classes("photos/train", "photos/val"), "its only", ["say --data {root}/photos"]),
        (
            classes("seg_train/seg_train", "seg_test/seg_test"),
            "has only the folder seg_",
            ["move them up"],
        ),
        (["cat/train", "cat/test", "dog/train"], "have splits in them", ["above the classes"]),
        (
            classes("train/images", "val/images"),
            "train/ has only the folder images/ in it, with cat/, dog/",
            ["move them up into train/"],
        ),
        (
            classes("fold1", "fold2"),
            "fold1/, fold2/ would be the classes, and each of them has cat/, dog/ in it",
            ["rename those to train/, val/", "put the images of each class together", "CSV with"],
        ),
        (
            classes("Trainning", "vaildation"),
            "would be the classes",
            ["(Trainning/ looks like train/, vaildation/ looks like val/)", "rename those to"],
        ),
        (
            [*classes("train2", "test2"), "train2/emu", "notes/readme.txt"],
            "test2/, train2/ would be the classes",
            ["test2/ looks like test/, train2/ looks like train/"],
        ),
        (classes("original", "augmented"), "would be the classes", ["CSV with path,label"]),
        (classes("2023", "2024"), "would be the classes", ["CSV with path,label"]),
        (
            classes("train/2023", "train/2024", "val/2023", "val/2024"),
            "2023/, 2024/ would be the classes",
            ["CSV with path,label"],
        ),
        (["images", "labels/1.txt"], "for detection or segmentation", ["path,label"]),
        (["train/images", "train/labels/1.txt"], "for detection or seg", ["path,label"]),
    ],
)
def test_doubtful_folders_stop_with_the_ways_out(
    tmp_path: Path, paths: list[str], problem: str, ways_out: list[str]
) -> None:
    with pytest.raises(GraftError) as raised:
        read_image_folder(write(tmp_path, *paths))
    message = str(raised.value)
    assert message.startswith(f"--data {tmp_path}")
    assert "\n" not in message
    for part in (problem, *ways_out):
        assert part.format(root=tmp_path) in message


@pytest.mark.parametrize(
    ("paths", "note"),
    [
        (["loose.jpg", "other.PNG"], "images in no class folder: 2 (loose.jpg, other.PNG)"),
        (["cat/@eaDir/1.jpg/SYNOPHOTO_THUMB.jpg"], "such as thumbnails: cat/@eaDir"),
        (["@eaDir/1.jpg"], "such as thumbnails: @eaDir"),
        (["__MACOSX/cat/1.jpg"], "such as thumbnails: __MACOSX"),
        (["dog/#recycle/1.jpg"], "such as thumbnails: dog/#recycle"),
        (["$RECYCLE.BIN/1.jpg"], "such as thumbnails: $RECYCLE.BIN"),
        (["emu/.DS_Store"], "no file in the class folders emu"),
        (
            ["cat/.3.jpg", "cat/.old/4.jpg", ".trash/5.PNG", ".6.jpg", "cat/._1.jpg", ".x/y.txt"],
            "hidden images and folders with images: 4 (.trash, .6.jpg, cat/.3.jpg, cat/.old)",
        ),
        (["cat/Thumbs.db", "cat/ehthumbs.db", "cat/SYNOFILE_THUMB_M.jpg"], None),
        (["notes.txt", ".DS_Store/x.jpg"], None),
    ],
)
def test_what_is_left_out_is_named(tmp_path: Path, paths: list[str], note: str | None) -> None:
    found = read_image_folder(write(tmp_path, "cat", "dog", *paths))
    assert count(found) == {"cat": 2, "dog": 2}
    notes = found.unread.describe(tmp_path)
    assert ([note] if note else []) == [each[-len(note) :] if note else each for each in notes]


def test_a_class_with_hidden_images_alone_is_named_with_them(tmp_path: Path) -> None:
    found = read_image_folder(write(tmp_path, "cat", "dog", "emu/.hidden.jpg"))
    assert found.unread.describe(tmp_path) == (
        "no file in the class folders emu",
        "hidden images and folders with images: 1 (emu/.hidden.jpg)",
    )


def test_pipes_in_class_folders_are_named_and_not_opened(tmp_path: Path) -> None:
    write(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "cat" / "3.jpg")
    (tmp_path / "dog" / "3.jpg").symlink_to("/dev/zero")
    found = read_image_folder(tmp_path)
    assert count(found) == {"cat": 2, "dog": 2}
    assert found.unread.describe(tmp_path) == ("pipes, devices and sockets: cat/3.jpg, dog/3.jpg",)


def test_folders_beside_splits_and_images_beside_their_classes_are_named(tmp_path: Path) -> None:
    paths = [*classes("train", "val"), "samples", "train/loose.jpg"]
    found = read_image_folder(write(tmp_path, *paths))
    assert found.unread.describe(tmp_path) == (
        "images in no class folder: 1 (train/loose.jpg)",
        "folders beside the splits: samples",
    )


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    root, disk = write(tmp_path / "photos", "cat", "dog"), write(tmp_path / "disk", "more", "emu")
    (root / "cat" / "more").symlink_to(disk / "more")
    (root / "dog" / "3.jpg").symlink_to(disk / "more" / "1.jpg")
    (root / "emu").symlink_to(disk / "emu")
    found = read_image_folder(root)
    assert count(found) == {"cat": 4, "dog": 3, "emu": 2}
    assert found.unread.describe(root) == ()


@pytest.mark.parametrize("target", [".", "..", "../..", "inner", "../cat/inner"])
def test_loops_of_links_end_and_no_folder_is_read_twice(tmp_path: Path, target: str) -> None:
    root = write(tmp_path / "photos", "cat", "cat/inner", "dog")
    (root / "cat" / "again").symlink_to(target)
    (root / "cat" / "inner" / "up").symlink_to("..")
    found = read_image_folder(root)
    assert count(found) == {"cat": 4, "dog": 2}
    assert all(path.parent.name in ("cat", "inner", "dog") for _, path in found.images)
    notes = found.unread.describe(root)
    is_above = target in ("..", "../..")
    assert notes == (("links back to a folder above them: cat/again",) if is_above else ())


def test_links_to_nothing_are_named_and_stay_images_that_cannot_be_read(tmp_path: Path) -> None:
    root = write(tmp_path, "cat", "dog")
    for number in range(3, 9):
        (root / "cat" / f"{number}.jpg").symlink_to(f"../.git/annex/objects/{number}.jpg")
    (root / "dog" / "self.jpg").symlink_to("self.jpg")
    found = read_image_folder(root)
    assert count(found) == {"cat": 8, "dog": 3}
    (note,) = found.unread.describe(root)
    assert note.startswith("links to nothing: 7 (cat/3.jpg, cat/4.jpg, cat/5.jpg, cat/6.jpg, cat/7")
    assert "git annex get, dvc pull" in note


def test_a_class_that_is_a_link_to_nothing_stops(tmp_path: Path) -> None:
    root = write(tmp_path, "cat", "dog")
    (root / "emu").symlink_to("/mnt/not/mounted/emu")
    with pytest.raises(GraftError, match="emu is a link to /mnt/not/mounted/emu, where nothing is"):
        read_image_folder(root)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    with make_open_folder() as folder:
        yield folder


def test_a_folder_that_may_not_be_read_is_named(open_folder: Path) -> None:
    write(open_folder, "cat", "cat/private", "dog")
    (open_folder / "cat" / "private").chmod(0)
    with as_nobody():
        found = read_image_folder(open_folder)
    assert count(found) == {"cat": 2, "dog": 2}
    assert found.unread.describe(open_folder) == (
        "folders that cannot be read: cat/private (Permission denied)",
    )
    assert found.unread.describe_closed(open_folder) == ("cat/private (Permission denied)",)


def test_a_class_that_may_not_be_read_stops(open_folder: Path) -> None:
    write(open_folder, "cat", "dog", "emu")
    (open_folder / "dog").chmod(0)
    with (
        as_nobody(),
        pytest.raises(GraftError, match="the class folder dog cannot be read: Permission denied"),
    ):
        read_image_folder(open_folder)


def test_names_that_differ_by_unicode_form_alone_are_told_apart_in_words() -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    check_unicode_forms("photos", ["cafe", composed, "CAFÉ"])
    with pytest.raises(GraftError) as raised:
        check_unicode_forms("photos", [decomposed, composed])
    assert "differ by Unicode form alone, 'cafe\\u0301' and 'caf\\xe9'" in str(raised.value)


@pytest.mark.parametrize("names", [("cat", "cat "), (" cat", "cat"), ("cat\xa0", "cat")])
def test_names_that_differ_by_outer_spaces_alone_stop(names: tuple[str, str]) -> None:
    with pytest.raises(GraftError, match="they differ by spaces around the name alone"):
        check_unicode_forms("photos", names)
    check_unicode_forms("photos", ["a cat", "acat"])


def test_names_that_differ_by_case_alone_are_found() -> None:
    names = ["A", "CAT", "a", "cat", "dog", "straße", "STRASSE"]
    assert find_case_twins(names) == [("CAT", "cat"), ("straße", "STRASSE")]


@pytest.mark.parametrize(
    ("locale", "message"),
    [
        ("C", "'caf\\udcc3\\udca9' is not ASCII, and the locale is; set LC_ALL=C.UTF-8"),
        ("C.UTF-8", None),
    ],
)
def test_a_locale_without_other_letters_is_named(
    tmp_path: Path, locale: str, message: str | None
) -> None:
    write(tmp_path, "café", "dog")
    code = "import sys, pathlib; from models.image_folder import read_image_folder as read; "
    run = subprocess.run(
        [sys.executable, "-c", code + "read(pathlib.Path(sys.argv[1]))", tmp_path],
        env={
            **os.environ,
            "LC_ALL": locale,
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == (0 if message is None else 1)
    assert message is None or message in run.stderr
