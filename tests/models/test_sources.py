"""What `--data` may name: paths before names, files that are no CSV, and the details of a CSV."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
import zipfile
from pathlib import Path

import pytest

from models.errors import GraftError
from models.sources import Source, read_source
from tests.support.images import draw_image


def read(data: str | Path) -> Source:
    return read_source(str(data), Path("nowhere"))


def test_a_folder_called_digits_goes_before_the_embedded_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read("digits").labelled) == 1797
    for name in ("seven", "eight"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "1.png").touch()
    source = read("digits")
    assert {name for _, name, _ in source.labelled} == {"seven", "eight"}
    assert source.notes == (
        f"this is {tmp_path}/digits; the embedded digits are read where no such path exists",
    )


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("cat/1.jpg", b"")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("cat/1.jpg"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_zip(), "it is a zip archive; unpack it"),
        (_tar(), "it is a tar archive; unpack it"),
        (gzip.compress(b"path,label\n", mtime=0), "it is a gzip file; unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(9), "it is a 7z archive"),
        (b"Rar!\x1a\x07" + bytes(9), "it is a rar archive"),
        (b"BZh9" + bytes(9), "it is a bzip2 file"),
        (b"\xfd7zXZ\0" + bytes(9), "it is an xz file"),
        (b"PAR1" + bytes(9), "it is a Parquet file; write its images to files"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "it is an HDF5 file"),
        (b"\x93NUMPY\1\0" + bytes(9), "it is a NumPy file"),
        (draw_image("red", 0), "it is a single image; name the folder of class folders"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "it is a single image"),
    ],
)
def test_a_file_that_is_no_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "photos"
    path.write_bytes(content)
    with pytest.raises(GraftError, match=f"^--data {path}: {message}"):
        read(path)


@pytest.mark.parametrize(
    "url", ["https://example.com/cats.zip", "s3://bucket/cats", "hf://datasets/cats", "file:///x"]
)
def test_a_url_is_named(url: str) -> None:
    with pytest.raises(GraftError, match=f"^--data {url}: it is a URL, and .*; download them"):
        read(url)


def test_pipes_sockets_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(GraftError, match="it is a pipe, which can be read only once; write it to"):
        read(tmp_path / "pipe")
    with pytest.raises(GraftError, match="it is a link to gone, where nothing is; mend the link"):
        read(tmp_path / "link")
    with pytest.raises(GraftError, match="not read from standard input; name a folder or a CSV"):
        read("-")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        with pytest.raises(GraftError, match="it is a device or socket"):
            read(tmp_path / "s")


def write_csv(folder: Path, text: str, *images: str) -> Path:
    for image in images:
        (folder / image).parent.mkdir(exist_ok=True)
        (folder / image).touch()
    (folder / "list.csv").write_text(text)
    return folder / "list.csv"


def test_spaces_around_paths_and_splits_are_stripped(tmp_path: Path) -> None:
    text = "path,label,split\n a.png ,x, train\n b.png,y,dev \n"
    source = read(write_csv(tmp_path, text, "a.png", "b.png"))
    assert [image for _, _, image in source.labelled] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert (source.splits, source.notes) == (["train", "val"], ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,label\na.png,x\ngone/1.png,y\ngone/2.png,y\n",
            "2 of 3 images are not there, looked for in {folder}: gone/1.png, gone/2.png; paths "
            "are relative to the CSV's own folder",
        ),
        (
            "path,label\nhttps://x.org/1.png,x\nb.png,y\n",
            "https://x.org/1.png (1 of them are URLs, which Graft does not download)",
        ),
        ("path|label\na.png|x\n", "it has 'path|label', separated by bars; save it separated by"),
        ("path,label\n/gone.png,x\na.png,y\n", "1 of 2 images are not there: /gone.png"),
        ("path,labels\na.png,x\ngone.png,x|y\n", "1 of 2 images are not there, looked for in"),
        ("path,labels\na.png,dog;sea\n", "line 2 has 'dog;sea' in labels, and no line has |"),
        ('path,labels\na.png,dog\nb.png,"dog,sea"\n', "line 3 has 'dog,sea' in labels"),
        ("path,labels\na.png,dog\tsea\n", "in labels, and no line has |; write | between names"),
        ('path,labels\na.png,"[""dog"", ""sea""]"\n', "line 2 has a JSON list in labels"),
        ('path,labels\na.png,"[""dog""]"\nb.png,a|b\n', "write the names with | between them"),
        ("path,label\n  ,x\n", "line 2 has no path"),
        ("path,label,split\na.png,x,extra\n", "the split 'extra'; allowed are train, val and test"),
    ],
)
def test_what_is_doubtful_in_a_csv_stops(tmp_path: Path, text: str, message: str) -> None:
    path = write_csv(tmp_path, text, "a.png", "b.png")
    with pytest.raises(GraftError) as raised:
        read(path)
    assert f"--data {path}: " in str(raised.value)
    assert message.format(folder=tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "path,label\na.png,x\na.png,y\nb.png,y\nb.png,y\n",
            "paths with different labels: 1, a.png (x, y); keep one line for each",
        ),
        ("path,labels\na.png,x|y\na.png,x\n", "paths with different labels: 1, a.png (x, x|y)"),
        (
            "path,label\na.png,x\n./a.png,y\n{folder}/../{folder.name}/a.png,x\nb.png,y\n",
            "paths with different labels: 1, a.png, ./a.png, {folder}/../{folder.name}/a.png "
            "(x, y); keep one line for each",
        ),
        ("path,label\na.png,x\nb.png,y\nb.png,y\n", "paths listed more than once: 1, b.png"),
        (
            "path,label\na.png,x\nb.png,y\ngone.png,y\n",
            "1 of 3 images are not there, looked for in {folder}: gone.png",
        ),
        (
            "path,label\na.png,x|y\nb.png,y\n",
            "classes with | in their names: x|y; if it separates several labels, call the column "
            "labels",
        ),
    ],
)
def test_what_is_odd_in_a_csv_is_told(tmp_path: Path, text: str, note: str) -> None:
    text = text.format(folder=tmp_path)
    (found,) = read(write_csv(tmp_path, text, "a.png", "b.png")).notes
    assert found.startswith(note.format(folder=tmp_path))


def test_a_semicolon_belongs_to_a_name_where_bars_separate(tmp_path: Path) -> None:
    source = read(write_csv(tmp_path, "path,labels\na.png,x;1|y\nb.png,x;1\n", "a.png", "b.png"))
    assert [labels for _, labels, _ in source.labelled] == [("x;1", "y"), ("x;1",)]


@pytest.mark.parametrize("name", ["Split", "SPLIT", " split", "split ", "Labels"])
def test_a_column_that_is_nearly_a_known_one_stops(tmp_path: Path, name: str) -> None:
    path = write_csv(tmp_path, f"path,label,{name}\na.png,x,train\nb.png,y,test\n")
    with pytest.raises(GraftError, match=f"{name!r}; write them in small letters, without spaces"):
        read(path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("subset", ("train", "test")),
        ("Set", ("a", "b")),
        ("fold", ("1", "2")),
        ("partition", ("0", "2")),
        ("is_valid", ("True", "False")),
        ("is_train", ("1", "0")),
        ("phase", ("train", "val")),
        ("used for", ("training", "validation")),
    ],
)
def test_a_column_that_may_be_the_split_stops(
    tmp_path: Path, name: str, values: tuple[str, str]
) -> None:
    text = f"path,label,{name}\na.png,x,{values[0]}\nb.png,y,{values[1]}\n"
    with pytest.raises(GraftError) as raised:
        read(write_csv(tmp_path, text, "a.png", "b.png"))
    assert f"the column {name!r} ({', '.join(sorted(values))})" in str(raised.value)
    assert "call it split, with the values train, val and test; otherwise remove it" in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("path,label,split,fold,note\na.png,x,train,1,n\nb.png,y,val,2,m\n", "fold, note"),
        ("path,label,subset\na.png,x,all\nb.png,y,all\n", "subset"),
        ("path,label,author,\na.png,x,me,\nb.png,y,you,\n", "author"),
        ("path,label,split,Split\na.png,x,train,a\nb.png,y,val,b\n", "Split"),
    ],
)
def test_columns_that_are_not_used_are_named(tmp_path: Path, text: str, note: str) -> None:
    assert read(write_csv(tmp_path, text, "a.png", "b.png")).notes == (f"columns not used: {note}",)


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize(
    "label", ["a\nb", "a\tb", "a\x1b[0m", "a\0", "a\u202eb", "a\u2028b", "\x7f"]
)
def test_a_label_is_printable_text(tmp_path: Path, column: str, label: str) -> None:
    path = write_csv(tmp_path, f'path,{column}\na.png,y|x\nb.png,"{label}"\n', "a.png", "b.png")
    with pytest.raises(GraftError, match=f"has .* in {column}, which is no printable text; take"):
        read(path)


def test_labels_of_any_script_are_read(tmp_path: Path) -> None:
    names = ["New\xa0York", "全角\u3000空白", "می\u200cشود", "👩\u200d🚀", "naïve"]
    text = "".join(f"a.png,{name}\n" for name in names)
    source = read(write_csv(tmp_path, f"path,label\n{text}", "a.png"))
    assert [label for _, label, _ in source.labelled] == names


def test_what_is_no_regular_file_in_a_csv_is_named_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    (tmp_path / "folder").mkdir()
    text = "path,label\na.png,dog\np,cat\n/dev/zero,cat\nfolder,dog\n"
    with pytest.raises(GraftError) as raised:
        read(write_csv(tmp_path, text, "a.png"))
    assert (
        "3 of 4 paths are no image files: p (a pipe), /dev/zero (a device or socket), folder (a "
        "folder); list regular files"
    ) in str(raised.value)
