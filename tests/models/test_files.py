"""Files and folders are written whole or not at all, and nothing else in the rooms renames."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import time
from pathlib import Path

import pytest

from models.errors import GraftError
from models.files import (
    check_writable,
    full_disk_in_words,
    make_readable,
    move_whole,
    remove_temporary,
    scratch_folder,
    temporary_folder,
    write_whole,
)

PROJECT_DIR = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["text, größer\n", b"\x00\xff", lambda path: path.touch()])
def test_text_bytes_or_a_functions_file_replace_what_was_there(
    content: object, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    write_whole(path, content)  # type: ignore[arg-type]
    expected = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == (expected if isinstance(expected, bytes) else b"")
    assert names(tmp_path) == ["a.txt"]


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_whole(path, fail)
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "a.txt", "text")
    assert (names(tmp_path), path.read_text()) == (["a.txt"], "before")


def test_a_killed_write_leaves_the_file_of_before_and_what_is_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def die(temporary: Path) -> None:
        temporary.write_text("half")
        os._exit(9)

    pid = os.fork()
    if pid == 0:
        write_whole(path, die)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert path.read_text() == "before"
    assert len(names(tmp_path)) == 2
    remove_temporary(tmp_path)
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    parent = tmp_path / "made"
    with temporary_folder(parent) as folder:
        (folder / "a").write_text("a")
        assert not (parent / "1").exists()
        assert move_whole(folder, parent / "1")
    assert (names(parent), names(parent / "1")) == (["1"], ["a"])


def test_a_folder_with_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "theirs").touch()
    with temporary_folder(tmp_path) as folder:
        (folder / "ours").touch()
        assert not move_whole(folder, tmp_path / "1")
        assert move_whole(folder, tmp_path / "2")
    assert (names(tmp_path / "1"), names(tmp_path / "2")) == (["theirs"], ["ours"])


def test_a_folder_whose_writer_fails_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with temporary_folder(tmp_path) as folder:
            (folder / "a").touch()
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert names(tmp_path) == []


def test_what_may_still_be_written_is_not_removed(tmp_path: Path) -> None:
    for name, age in ((".tmp-old", 100), (".tmp-new", 1), ("old", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_temporary(tmp_path, older_than_seconds=50)
    assert names(tmp_path) == [".tmp-new", "old"]


def test_no_other_file_renames() -> None:
    pattern = re.compile(r"\.rename\(|os\.replace|\.tmp-|mkstemp|NamedTemporaryFile")
    found = [
        path.relative_to(PROJECT_DIR).as_posix()
        for room in ("models", "finetune", "service", "benchmarks", "deploy")
        for path in (PROJECT_DIR / room).rglob("*.py")
        if pattern.search(path.read_text())
    ]
    assert found == ["models/files.py"]


# ----------------------------------------------------------- file systems that lack something

REFUSALS = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EPERM, errno.EACCES]


@pytest.mark.parametrize("number", REFUSALS)
def test_a_file_system_that_refuses_fsync_of_a_folder_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "a.txt", "text")
    with temporary_folder(tmp_path) as temporary:
        (temporary / "b.txt").write_text("text")
        assert move_whole(temporary, tmp_path / "1")
    assert names(tmp_path) == ["1", "a.txt"]


@pytest.mark.parametrize("number", REFUSALS)
def test_a_file_system_that_refuses_chmod_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "chmod", refuse)
    make_readable(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_not_taken_for_one_that_lacks_something(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_whole(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


def test_a_folder_that_could_not_be_written_is_known_before_it_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "newer")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(OSError, match="1000000000000 MB needed"):
        check_writable(tmp_path / "new", 10**18)
    with pytest.raises(FileNotFoundError) as caught:
        check_writable(Path("/proc/sys/graft"))
    assert caught.value.filename == "/proc/sys"


def test_a_full_disk_is_named_by_the_option_that_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"--output": Path("/dev/full/runs"), "TMPDIR": tmp_path}
    with (
        pytest.raises(
            GraftError, match="a disk: No space left on device; make room, or name another folder"
        ),
        full_disk_in_words(folders),
        Path("/dev/full").open("w") as file,
    ):
        file.write("text")
    monkeypatch.setattr("models.files._FULL_BYTES", 10**18)
    with (
        pytest.raises(GraftError, match=f"TMPDIR {tmp_path}: No space left"),
        full_disk_in_words({"TMPDIR": tmp_path}),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), full_disk_in_words(folders):
        (tmp_path / "missing").read_text()


def test_without_a_folder_for_temporary_files_tmpdir_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/sys")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/sys")
    with pytest.raises(GraftError, match="TMPDIR=/proc/sys: no folder for temporary files"):
        scratch_folder().__enter__()
