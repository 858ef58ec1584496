"""A version with other labels than the one before is refused, unless it is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.report.publishing import check_labels
from models.errors import GraftError


def write_version(repository: Path, version: int, text: str) -> None:
    folder = repository / "images" / str(version)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)


def write_labels(repository: Path, version: int, labels: list[str]) -> None:
    write_version(repository, version, json.dumps({"label_names": labels}))


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ([["cat", "dog"]], ["cat", "dog"], None),
        ([], ["cat", "dog"], None),
        ([["cat"], ["cat", "dog"]], ["cat", "dog"], None),
        ([["cat", "dog"]], ["car", "ship"], "new are car, ship, gone are cat, dog"),
        ([["cat", "dog"]], ["cat", "dog", "emu"], "new are emu;"),
        ([["cat", "dog", "emu"]], ["cat", "dog"], "gone are emu;"),
        ([["cat", "dog"]], ["dog", "cat"], "their order differs;"),
        ([["cat", "dog"]], ["Cat", "dog"], "new are Cat, gone are cat;"),
        ([["cat", "dog"], ["cat"]], ["cat", "dog"], "images/2 has other labels: new are dog;"),
        ([["a"]], [f"c{number}" for number in range(9)], "new are c0, c1, c2, c3, c4 and 4 more"),
    ],
)
def test_other_labels_are_refused_unless_they_are_meant(
    tmp_path: Path, before: list[list[str]], after: list[str], change: str | None
) -> None:
    for version, labels in enumerate(before, 1):
        write_labels(tmp_path, version, labels)
    check_labels(tmp_path, "images", after, new_labels=True)
    if change is None:
        check_labels(tmp_path, "images", after, new_labels=False)
        return
    with pytest.raises(GraftError) as raised:
        check_labels(tmp_path, "images", after, new_labels=False)
    for part in (change, "say --name NAME", "say --new-labels"):
        assert part in str(raised.value)


def test_a_version_that_cannot_be_read_leaves_the_one_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_labels(tmp_path, 1, ["cat", "dog"])
    write_version(tmp_path, 2, "{")
    check_labels(tmp_path, "images", ["cat", "dog"], new_labels=False)
    assert "images/2: its labels cannot be read" in caplog.text
    with pytest.raises(GraftError, match="images/1 has other labels"):
        check_labels(tmp_path, "images", ["ship"], new_labels=False)
