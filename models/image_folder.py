"""A folder of images: which folders are splits, which are classes, and what is left out.

The one place that decides what a folder means. Where its names allow two readings, reading stops
with the way out of each.
"""

from __future__ import annotations

import codecs
import difflib
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.errors import GraftError, join_first

SplitName = Literal["train", "val", "test"]

_SPLIT_WORDS: dict[SplitName, str] = {
    "train": "train|training|trn|trainval|trainvalid",
    "val": "val|valid|validation|validate|validating|dev|devel|development|eval|evaluation",
    "test": "test|testing|tst|holdout|heldout",
}
# Around a split's word: Training_Set, test-images, valdata, seg_train, val2017.
_BEFORE = r"(?:imgs?|images?|data|datasets?|split|seg)?"
_AFTER = r"(?:sets?|data|datasets?|imgs?|images?|splits?|samples?|files|folder)?(?:\d{4})?"
_SPLIT_PATTERNS = {
    split: re.compile(f"{_BEFORE}(?:{words}){_AFTER}") for split, words in _SPLIT_WORDS.items()
}
# Files that operating systems leave in folders.
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "zbthumbnail.info"}
# Folders with thumbnails, removed files or snapshots: Synology, QNAP, macOS, Windows, Linux.
_SYSTEM_FOLDERS = {
    "@eadir",
    "@tmp",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "_vti_cnf",
}
# Files and folders of programs that hold no images of their own: macOS, git, git-annex, DVC.
_HIDDEN_BY_SYSTEM = {".DS_Store", ".git", ".dvc", ".Spotlight-V100", ".fseventsd"}
# Only to decide what a folder is: what is read as an image depends on a file's content.
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp"}
_IMAGE_SUFFIXES |= {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"}
# Belong to the spelling of Persian and Indic words, and to emoji.
_JOINERS = "\u200c\u200d"
# Folders beside images/ that annotations of detection and segmentation are kept in.
_ANNOTATIONS = {"labels", "annotations", "masks", "gt", "xml", "ground_truth"}

_Identity = tuple[int, int]


@dataclass
class Unread:
    """What is in a folder and is not read, or leads to nothing; filled while it is read."""

    loose: list[Path] = field(default_factory=list)
    not_splits: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    closed: list[tuple[Path, str]] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)
    system: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    no_files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)

    def describe(self, root: Path) -> tuple[str, ...]:
        """A clause for each kind, with names relative to `root`."""

        def names(paths: Sequence[Path]) -> str:
            return join_first([str(path.relative_to(root)) for path in paths])

        notes = []
        if self.loose:
            notes.append(f"images in no class folder: {len(self.loose):,} ({names(self.loose)})")
        if self.not_splits:
            notes.append(f"folders beside the splits: {names(self.not_splits)}")
        if self.empty:
            notes.append(f"no file in the class folders {names(self.empty)}")
        if self.closed:
            closed = self.describe_closed(root)
            notes.append(f"folders that cannot be read: {join_first(closed)}")
        if self.loops:
            notes.append(f"links back to a folder above them: {names(self.loops)}")
        if self.system:
            notes.append(f"folders of the system, such as thumbnails: {names(self.system)}")
        if self.hidden:
            notes.append(
                f"hidden images and folders with images: {len(self.hidden):,} "
                f"({names(self.hidden)})"
            )
        if self.no_files:
            notes.append(f"pipes, devices and sockets: {names(self.no_files)}")
        if self.dangling:
            notes.append(
                f"links to nothing: {len(self.dangling):,} ({names(self.dangling)}); fetch their "
                "files (git annex get, dvc pull), or remove them"
            )
        return tuple(notes)

    def describe_closed(self, root: Path) -> tuple[str, ...]:
        return tuple(f"{path.relative_to(root)} ({reason})" for path, reason in self.closed)


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder with their classes, and their splits where it has some."""

    images: list[tuple[str, Path]]  # class name, file
    splits: list[SplitName] | None
    unread: Unread


def read_split_name(name: str) -> SplitName | None:
    """The split that a name stands for, in any usual spelling: `Training_Set`, `dev`, `val2017`."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    for split, pattern in _SPLIT_PATTERNS.items():
        if pattern.fullmatch(plain):
            return split
    return None


def read_image_folder(root: Path) -> ImageFolder:
    """Read `root/<class>/…`, or `root/<split>/<class>/…`.

    Raises GraftError where a name could mean a class as well as a split, where there are no class
    folders, and where a whole class cannot be read; OSError where `root` cannot be read.
    """
    unread = Unread()
    folders = _visible_folders(root, unread)
    split_of = _choose_splits(root, folders)
    if not split_of:
        _check_depth(root, folders)
        return ImageFolder(_read_classes(root, root, folders, unread), None, unread)
    unread.not_splits += [folder for folder in folders if folder not in split_of]
    classes_of = {folder: _visible_folders(folder, unread) for folder in split_of}
    _check_wrapped_splits(root, classes_of)
    images: list[tuple[str, Path]] = []
    splits: list[SplitName] = []
    for folder, split in split_of.items():
        found = _read_classes(root, folder, classes_of[folder], unread)
        images += found
        splits += [split] * len(found)
    return ImageFolder(images, splits, unread)


def check_unicode_forms(data: str, names: Sequence[str]) -> None:
    """Raise GraftError where two names look the same and differ by Unicode form or outer spaces."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).strip(), name)
        if other != name:
            is_spaced = name.strip() != name or other.strip() != other
            by = "spaces around the name" if is_spaced else "Unicode form"
            raise GraftError(
                f"--data {data}: two class names look the same, {name!r}: they differ by {by} "
                f"alone, {other!a} and {name!a}; give both one spelling where they "
                "are one class, or other names where they are two"
            )


def find_case_twins(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ by case alone; single letters, which may be read, are none.

    They may be two classes, so they are no error.
    """
    known: dict[str, str] = {}
    pairs = []
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name and len(name) > 1:
            pairs.append((other, name))
    return pairs


def _choose_splits(root: Path, folders: Sequence[Path]) -> dict[Path, SplitName]:
    """The folders that are splits; none where all of them are classes.

    A split has class folders in it. One folder of a split's name without folders in it, beside
    others, is a class.
    """
    split_of = {
        folder: split for folder in folders if (split := read_split_name(folder.name)) is not None
    }
    others = [folder for folder in folders if folder not in split_of]
    inside = {folder: {path.name for path in _visible_folders(folder)} for folder in folders}
    nested = {name for folder in split_of for name in inside[folder]}
    alike = [folder for folder in others if inside[folder] & nested]
    if not split_of or (len(split_of) == 1 and others and not nested):
        return {}
    if not nested:
        raise _doubtful(
            root,
            f"{_list(split_of)} could be splits or classes, and no class folders are in them",
            "If they are splits, put the images of each class in a folder of its own "
            f"({next(iter(split_of)).name}/cat/1.jpg)",
        )
    if "train" not in split_of.values():
        if len(split_of) == 1 and others and not alike:
            return {}
        raise _doubtful(
            root,
            f"{_list(split_of)} could be splits or classes, and there is no train/ beside them",
            "If they are splits, add train/, or rename to train/ the one to train on",
        )
    _check_one_folder_each(root, split_of)
    if alike:
        raise _doubtful(
            root,
            f"{_list(alike)} has class folders as {_list(split_of)} has, and no split's name",
            "If it is a split, rename it to val/ or test/; if it is not to be read, move it out of "
            f"{root}",
        )
    if len(split_of) == 1 and any(_holds_image(folder) for folder in others):
        raise _doubtful(
            root,
            f"{_list(split_of)} could be a split or a class beside {_list(others)}",
            f"If it is a split, move {_list(others)} out of {root}",
        )
    return split_of


def _check_one_folder_each(root: Path, split_of: dict[Path, SplitName]) -> None:
    for split in _SPLIT_WORDS:
        same = [folder for folder, found in split_of.items() if found == split]
        if len(same) > 1:
            raise GraftError(
                f"--data {root}: {_list(same)} are all names of the split {split}; put their "
                "images together in one of them, or rename one to the split that it is (train/, "
                "val/, test/)"
            )


def _check_depth(root: Path, folders: Sequence[Path]) -> None:
    """Raise GraftError where class folders seem to be one level deeper than is read."""
    only = folders
    while len(only) == 1:
        inner = _visible_folders(only[0])
        if len(inner) > 1:
            raise GraftError(
                f"--data {root}: its only folder is {folders[0].name}/, which would be the only "
                f"class; if the classes are {_list(inner)} in it, say --data {only[0]}"
            )
        only = inner
    inside = {folder: _visible_folders(folder) for folder in folders}
    found = [{read_split_name(path.name) for path in paths} - {None} for paths in inside.values()]
    with_splits = [folder for folder, names in zip(folders, found, strict=True) if names]
    if any(len(names) > 1 for names in found):
        raise GraftError(
            f"--data {root}: the folders {_list(with_splits)} have splits in them, whose images "
            f"would be mixed; put the splits above the classes ({root.name}/train/cat/1.jpg), or "
            f"say --data {with_splits[0]} if the classes are below its splits"
        )
    names = {folder.name.lower() for folder in folders}
    if "images" in names and len(names) > 1 and names <= _ANNOTATIONS | {"images"}:
        raise GraftError(
            f"--data {root}: {_list(folders)} are the folders of a data set for detection or "
            "segmentation, not classes; put the images of each class in a folder named after the "
            "class, or list them in a CSV with path,label"
        )
    _check_repeated_folders(root, inside)


def _check_repeated_folders(root: Path, inside: dict[Path, list[Path]]) -> None:
    """Raise GraftError where the folders have the same folders in them, as splits would have."""
    nested = {folder: paths for folder, paths in inside.items() if paths}
    found = [{path.name for path in paths} for paths in nested.values()]
    if len(found) < 2 or not _share_folders(found):
        return
    # Only now are files looked for, which takes longer.
    if any(_holds_image(folder) for folder in inside if folder not in nested) or any(
        has_image_suffix(path) for folder in nested for path in folder.iterdir()
    ):
        return
    names_of = {
        folder: {path.name for path in paths if _holds_image(path)}
        for folder, paths in nested.items()
    }
    shared = _share_folders(list(names_of.values()))
    if not shared:
        return
    outer, inner = _list(list(names_of)), join_first([f"{name}/" for name in sorted(shared)])
    similar = [
        f"{folder.name}/ looks like {split}/"
        for folder in names_of
        if (split := _guess_split(folder.name)) is not None
    ]
    hint = f" ({join_first(similar)})" if similar else ""
    raise GraftError(
        f"--data {root}: {outer} would be the classes, and each of them has {inner} in it. If "
        f"{inner} are the classes and {outer} are splits{hint}, rename those to train/, val/ and "
        "test/; if they are no splits, put the images of each class together in one folder; if "
        f"{outer} are the classes, list the images in a CSV with path,label"
    )


def _share_folders(names: Sequence[set[str]]) -> set[str]:
    """The names in all of the folders; none where they are a wrapper, or few of the names."""
    shared = set.intersection(*names)
    return shared if len(shared) > 1 and 2 * len(shared) >= len(set.union(*names)) else set()


def _guess_split(name: str) -> str | None:
    """The split that a misspelt name seems to mean."""
    plain = re.sub(r"[\W\d_]+", "", name.casefold())
    for split, words in _SPLIT_WORDS.items():
        if difflib.get_close_matches(plain, words.split("|"), 1, 0.75):
            return split
    return None


def _check_wrapped_splits(root: Path, classes_of: dict[Path, list[Path]]) -> None:
    for folder, classes in classes_of.items():
        elsewhere = {
            path.name for other, paths in classes_of.items() if other != folder for path in paths
        }
        # The only folder of one split, or the same of all.
        if len(classes) == 1 and (classes[0].name not in elsewhere or len(elsewhere) == 1):
            inner = _visible_folders(classes[0])
            if len(inner) > 1:
                raise GraftError(
                    f"--data {root}: {folder.name}/ has only the folder {classes[0].name}/ in it, "
                    f"with {_list(inner)}; if these are the classes, move them up into "
                    f"{folder.name}/"
                )
        if len(classes) > 1:
            _check_depth(folder, classes)


def _read_classes(
    root: Path, parent: Path, folders: Sequence[Path], unread: Unread
) -> list[tuple[str, Path]]:
    _look_beside(root, parent, unread)
    if not folders:
        raise GraftError(
            f"--data {parent}: no class folders in it; put the images of each class in a folder "
            "named after the class (photos/cat/1.jpg, photos/dog/2.jpg), or in train/ and val/ "
            "with class folders each"
        )
    images: list[tuple[str, Path]] = []
    for folder in folders:
        _check_class_name(parent, folder.name)
        paths = _find_images(folder, unread)
        if unread.closed and unread.closed[-1][0] == folder:
            raise GraftError(
                f"--data {root}: the class folder {folder.relative_to(root)} cannot be read: "
                f"{unread.closed[-1][1]}; make it readable, or move it out of {parent}"
            )
        if not paths:
            unread.empty.append(folder)
        images += [(folder.name, path) for path in paths]
    return images


def has_images(folder: Path) -> bool:
    """Whether images, by their suffixes, are in a folder or in one of its folders."""
    return any(has_image_suffix(path) for pattern in ("*", "*/*") for path in folder.glob(pattern))


def is_printable(name: str) -> bool:
    """Whether a class may be called so: something to show, no control characters, all text.

    Stricter, `str.isprintable` refuses emoji of several parts and spaces that do not break.
    """
    return bool(name.strip()) and not any(
        unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS
        for char in name
    )


def _check_class_name(parent: Path, name: str) -> None:
    is_undecoded = any("\udc80" <= char <= "\udcff" for char in name)
    if is_undecoded and codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        raise GraftError(
            f"--data {parent}: the name of the class folder {name!r} is not ASCII, and the locale "
            "is; set LC_ALL=C.UTF-8, or another locale with UTF-8"
        )
    if not is_printable(name):
        raise GraftError(
            f"--data {parent}: the class folder {name!r} has a name that is no printable text; "
            "rename it"
        )


def _look_beside(root: Path, parent: Path, unread: Unread) -> None:
    """Note images beside class folders. Raises GraftError for a class that is a link to nothing."""
    for path in sorted(parent.iterdir()):
        if path.is_dir():
            continue
        if _is_hidden(path.name):
            _note_hidden(path, False, unread)
            continue
        if has_image_suffix(path):
            unread.loose.append(path)
        elif path.is_symlink() and not path.exists() and not path.suffix:
            raise GraftError(
                f"--data {root}: {path.relative_to(root)} is a link to {path.readlink()}, where "
                "nothing is; if it is a class, fetch its files or mend the link, otherwise remove "
                "it"
            )


def _find_images(folder: Path, unread: Unread) -> list[Path]:
    """Every file below a class folder, through links too, each real folder once.

    A file's content decides later whether it is an image. Links to nothing are among them, to be
    named with the images that cannot be read.
    """
    images: list[Path] = []
    above = {_identify(parent) for parent in folder.resolve().parents}
    visited: set[_Identity] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        # Linked folders last: what is read both ways has the name without a link.
        current = folders.pop() if folders else links.pop(0)
        try:
            identity = _identify(current)
            if identity in above:
                unread.loops.append(current)
                continue
            if identity in visited:
                continue
            visited.add(identity)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            unread.closed.append((current, error.strerror or str(error)))
            continue
        for entry in entries:
            path = Path(entry.path)
            is_link = entry.is_symlink()
            is_folder = path.is_dir() if is_link else entry.is_dir()
            if _is_hidden(entry.name):
                _note_hidden(path, is_folder, unread)
            elif is_folder:
                (links if is_link else folders).append(path)
            elif path.is_file() if is_link else entry.is_file():
                images.append(path)
            elif is_link and not path.exists():
                images.append(path)
                unread.dangling.append(path)
            else:
                unread.no_files.append(path)
    return sorted(images)


def _visible_folders(folder: Path, unread: Unread | None = None) -> list[Path]:
    """The folders in it but for hidden ones and the system's, which `unread` notes."""
    try:
        folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:
        if unread is not None:
            raise
        return []
    if unread is not None:
        for path in folders:
            if _is_hidden(path.name):
                _note_hidden(path, True, unread)
    return [path for path in folders if not _is_hidden(path.name)]


def _note_hidden(path: Path, is_folder: bool, unread: Unread) -> None:
    """Note a folder of the system, and what is hidden and is or has an image."""
    if not path.name.startswith("."):
        if is_folder:
            unread.system.append(path)
        return
    if path.name in _HIDDEN_BY_SYSTEM or path.name.startswith("._"):
        return
    if _holds_image(path) if is_folder else has_image_suffix(path):
        unread.hidden.append(path)


def _is_hidden(name: str) -> bool:
    lower = name.lower()
    return (
        name.startswith(".")
        or lower in _SYSTEM_FILES
        or lower in _SYSTEM_FOLDERS
        or lower.startswith("synofile_thumb")
    )


def _holds_image(folder: Path) -> bool:
    return any(has_image_suffix(Path(name)) for _, _, names in os.walk(folder) for name in names)


def has_image_suffix(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES


def _identify(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _list(folders: Sequence[Path] | dict[Path, SplitName]) -> str:
    return join_first([f"{folder.name}/" for folder in folders])


def _doubtful(root: Path, problem: str, if_splits: str) -> GraftError:
    return GraftError(
        f"--data {root}: {problem}. {if_splits}; if they are classes, list the images in a CSV "
        "with path,label"
    )
