"""What the system refuses is passed on in words: its text and the file, not its number."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from urllib.error import URLError

import pytest

from models.errors import describe_error, first_line


def test_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Errno") as caught:
        (tmp_path / "gone").read_text()
    assert describe_error(caught.value) == f"No such file or directory: {tmp_path / 'gone'}"


def test_an_error_without_a_file_and_one_that_is_wrapped() -> None:
    refused = OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    assert describe_error(refused) == describe_error(URLError(refused)) == "Connection refused"


def test_what_is_no_error_of_the_system_speaks_for_itself() -> None:
    assert describe_error(RuntimeError("no kernel image")) == "no kernel image"
    assert describe_error(OSError("cannot write")) == "cannot write"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no kernel image\nCompile with"), "no kernel image"),
        (RuntimeError("\n  shapes differ\n"), "shapes differ"),
        (AssertionError(), "AssertionError"),
        (MemoryError(" \n"), "MemoryError"),
    ],
)
def test_the_first_line_of_an_error_is_never_missing(error: Exception, line: str) -> None:
    assert first_line(error) == line
