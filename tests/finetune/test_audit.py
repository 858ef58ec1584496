"""An audit finds what is wrong with real images; --strict stops a run on leaks."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from benchmarks.audit import score
from benchmarks.faults import Faults, plant_faults
from finetune.audit import audit, main
from finetune.auditing.findings import Audit
from finetune.config import AuditOptions, Options
from finetune.data.splits import load_splits
from finetune.run import run
from models.checkpoint import load_checkpoint
from models.errors import GraftError
from models.prepared import PreparedBackbone
from tests.conftest import SMALL_SIZE
from tests.support.images import draw_shape, write_class_folders
from tests.support.pages import ParsedPage


def audit_of(data: Path, output: Path, cache_dir: Path, **changes: Any) -> Audit:
    return audit(
        AuditOptions(
            data=str(data),
            image_size=SMALL_SIZE,
            output=output,
            cache_dir=cache_dir,
            precision="fp32",
            **changes,
        )
    )


def found_paths(found: Audit, *kinds: Any) -> list[str]:
    return [
        Path(finding.sample.key).name
        for finding in found.of_kind(*kinds)
        if finding.sample is not None
    ]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Faults planted in the digits.


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """In 800 digits and 200 to validate on."""
    splits = load_splits("digits", data_root=Path("nowhere"), val_fraction=0.2, seed=0)
    some = splits.without([sample.key for sample in (*splits.train[::2], *splits.val[::2])])
    return plant_faults(some, tmp_path_factory.mktemp("planted") / "digits")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def found(small_prepared: PreparedBackbone, faults: Faults, output: Path, cache_dir: Path) -> Audit:
    return audit_of(faults.folder, output, cache_dir)


def test_planted_faults_are_found_and_little_else(found: Audit, faults: Faults) -> None:
    """benchmarks/audit.py measures the same on larger images."""
    scored = score(found, faults)
    assert scored.exact == 1
    assert scored.near >= 0.9
    assert scored.false_alarms <= 0.01
    assert scored.flipped >= 0.6
    assert scored.broken == 1
    assert scored.is_class_found


def test_copies_across_the_split_are_leaks_and_others_are_not(found: Audit, faults: Faults) -> None:
    sides = {"exact_leak": "val", "exact_duplicate": "train"}
    for kind, side in sides.items():
        planted = {path.name for path in faults.exact if path.parts[-3] == side}
        assert planted <= set(found_paths(found, kind))
    for finding in found.leaks:
        assert finding.split == "val"
        assert finding.other is not None
        assert finding.other[0] == "train"


def test_the_score_is_told_with_and_without_leaks(found: Audit) -> None:
    whole, clean = found.scores["val"]
    assert clean is not None
    assert clean < whole
    (line,) = (line for line in found.to_lines() if "accuracy" in line)
    num_leaks = len(found.leaks)
    assert (
        line
        == f"audit: the probe's val accuracy is {whole:.4f} with {num_leaks} images of another "
        f"split, {clean:.4f} without"
    )
    assert found.to_dict()["accuracy"] == {"val": {"all": whole, "without_leaks": clean}}


def test_the_table_has_a_row_for_each_finding(found: Audit, faults: Faults, output: Path) -> None:
    rows = read_rows(output / "audit-digits.csv")
    assert list(rows[0]) == ["kind", "split", "path", "label", "detail", "score"]
    assert len(rows) == len(found.findings)
    assert rows[0]["kind"] == "unreadable"
    missing = next(row for row in rows if row["kind"] == "missing_class")
    assert missing == {
        "kind": "missing_class",
        "split": "val",
        "path": "",
        "label": faults.missing,
        "detail": f"class '{faults.missing}' has no image in val",
        "score": "",
    }
    scores = [float(row["score"]) for row in rows if row["kind"] == "wrong_label"]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        assert not row["path"] or Path(row["path"]).is_absolute()


def test_the_page_shows_everything_and_loads_nothing(found: Audit, output: Path) -> None:
    page = (output / "audit-digits.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|action)=["'](?!data:image/webp;base64,|#)""", page)
    words = re.sub(r"data:image/webp;base64,[^\"]+", "", page)
    assert "url(" not in words
    assert "http" not in words.replace("http-equiv", "")
    for kind, number in found.count().items():
        assert (f'id="{kind}"' in page) == bool(number)
    places = ParsedPage(page).values("value")
    for finding in found.leaks:
        assert finding.sample is not None
        assert finding.sample.place in places
    images = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert images
    assert Image.open(io.BytesIO(base64.b64decode(images[0]))).size == (176, 176)


def test_strict_ends_with_an_error_after_all_is_written(
    found: Audit,
    faults: Faults,
    tmp_path: Path,
    cache_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (
        "--data",
        faults.folder,
        "--image-size",
        SMALL_SIZE,
        "--output",
        tmp_path,
        "--cache-dir",
        cache_dir,
        "--precision",
        "fp32",
    )
    assert main([*map(str, options), "--strict"]) == 2
    said = capsys.readouterr()
    assert f"error: {len(found.leaks)} images leak from one split to another:" in said.err
    assert "the same file as" in said.err
    assert read_rows(tmp_path / "audit-digits.csv")
    assert "Exact copies across splits: 10" in said.out
    assert said.out.count("has no image in val") == 1
    assert "unreadable" not in said.err


# Small folders.


def test_a_wrong_extension_is_told_from_a_right_one(
    small_prepared: PreparedBackbone, tmp_path: Path, cache_dir: Path
) -> None:
    data = write_class_folders(tmp_path / "data", 6)
    (data / "circle" / "drawn.png").write_bytes(draw_shape("circle", 50, "JPEG"))
    (data / "circle" / "photo.JPG").write_bytes(draw_shape("circle", 51, "JPEG"))
    (data / "cross" / "scan.txt").write_bytes(draw_shape("cross", 52, "PNG"))
    (data / "square" / "without").write_bytes(draw_shape("square", 53, "WEBP"))
    found = audit_of(data, tmp_path, cache_dir)
    assert found_paths(found, "wrong_extension") == ["drawn.png", "scan.txt"]
    assert (
        found.of_kind("wrong_extension")[0].detail
        == "named .png, but its content is JPEG; rename it to .jpg"
    )


def test_names_are_shown_and_never_run(
    small_prepared: PreparedBackbone, tmp_path: Path, cache_dir: Path
) -> None:
    data = write_class_folders(tmp_path / "data", 6)
    name = '"><script>alert(1)<&.jpeg'
    for shape in ("circle", "cross"):
        (data / shape / name).write_bytes((data / "circle" / "0.jpeg").read_bytes())
    (data / "circle").rename(data / "<b>circle")
    found = audit_of(data, tmp_path, cache_dir)
    assert any(
        "but labelled" in finding.detail
        for finding in found.of_kind("exact_duplicate", "exact_leak")
    )
    page = (tmp_path / "audit-data.html").read_text(encoding="utf-8")
    parsed = ParsedPage(page)
    assert parsed.open == []
    assert parsed.tags.count("script") == 1
    assert "<b>circle" not in page
    assert "<b>circle" in parsed.text
    assert name in parsed.text
    assert any(value.endswith(name) for value in parsed.values("title"))
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]


def test_images_without_fault_are_said_to_be_so(
    small_prepared: PreparedBackbone, tmp_path: Path, cache_dir: Path
) -> None:
    data = write_class_folders(tmp_path / "data", 16)
    found = audit_of(data, tmp_path, cache_dir, min_images=5)
    assert not found.of_kind(
        "unreadable",
        "exact_leak",
        "near_leak",
        "exact_duplicate",
        "near_duplicate",
        "small_class",
        "missing_class",
    )
    assert audit_of(data, tmp_path, cache_dir, min_images=14).count()["small_class"] == 3


def test_a_run_is_not_proposed_on_what_it_would_refuse(
    small_prepared: PreparedBackbone,
    tmp_path: Path,
    cache_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_class_folders(tmp_path / "data", 16)
    audit_of(data, tmp_path, cache_dir)
    assert f"finetune/run.py --data {data}" in capsys.readouterr().out
    for folder in sorted(data.iterdir()):
        shutil.copytree(folder, tmp_path / "split" / "train" / folder.name)
    for folder in sorted(data.iterdir())[1:]:
        shutil.copytree(folder, tmp_path / "split" / "val" / folder.name)
    audit_of(tmp_path / "split", tmp_path, cache_dir)
    said = capsys.readouterr().out
    assert "finetune/run.py" not in said
    assert "Next: add images of the classes that a split lacks" in said


def test_a_source_of_one_class_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "1.jpg").write_bytes(draw_shape("circle", 1))
    with pytest.raises(GraftError, match="only one class"):
        audit_of(tmp_path / "data", tmp_path, cache_dir)


# Within a run.


def options_of(data: Path, tmp_path: Path, cache_dir: Path, **changes: Any) -> Options:
    return Options(
        data=str(data),
        image_size=SMALL_SIZE,
        output=tmp_path / "runs",
        repository=tmp_path / "checkpoints",
        cache_dir=cache_dir,
        precision="fp32",
        **changes,
    )


def newest_run(tmp_path: Path) -> Path:
    return max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_a_run_is_audited_and_its_split_keeps_duplicates_together(
    small_prepared: PreparedBackbone,
    tmp_path: Path,
    cache_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_class_folders(tmp_path / "shapes", 12)
    for number in range(4):
        shutil.copy(data / "circle" / f"{number}.jpeg", data / "circle" / f"copy-{number}.jpeg")
    with caplog.at_level("INFO", "graft"):
        run(options_of(data, tmp_path, cache_dir))
    run_dir = newest_run(tmp_path)
    rows = read_rows(run_dir / "audit.csv")
    assert sum(row["kind"] == "exact_duplicate" for row in rows) == 4
    assert not any(row["kind"].endswith("leak") for row in rows)
    assert (run_dir / "audit.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (
        json.loads((run_dir / "metrics.json").read_text())["audit"]["found"]["exact_duplicate"] == 4
    )
    sides = {
        Path(row["path"]).name: row["split"]
        for row in read_rows(run_dir / "splits.csv")
        if "circle" in row["path"]
    }
    for number in range(4):
        assert sides[f"{number}.jpeg"] == sides[f"copy-{number}.jpeg"]
    assert f"audit: look at {run_dir / 'audit.html'}" in caplog.messages


def test_an_image_of_something_else_is_an_outlier(
    small_prepared: PreparedBackbone, tmp_path: Path, cache_dir: Path
) -> None:
    data = write_class_folders(tmp_path / "data", 30)
    photo = next(Path(datasets.__file__).parent.glob("images/china.jpg"))
    shutil.copy(photo, data / "cross" / "holiday.jpg")
    assert found_paths(audit_of(data, tmp_path, cache_dir), "outlier") == ["holiday.jpg"]


def test_a_later_run_on_a_grown_folder_moves_no_image(
    small_prepared: PreparedBackbone, tmp_path: Path, cache_dir: Path
) -> None:
    data = write_class_folders(tmp_path / "shapes", 12)
    run(options_of(data, tmp_path, cache_dir))
    first = {row["path"]: row["split"] for row in read_rows(newest_run(tmp_path) / "splits.csv")}
    for path, split in list(first.items()):
        # A copy of each, on the original's side.
        copy = Path(path).with_name(f"copy-{Path(path).name}")
        shutil.copy(path, copy)
        first[str(copy)] = split
    run(options_of(data, tmp_path, cache_dir, seed=7, views=2))
    assert {
        row["path"]: row["split"] for row in read_rows(newest_run(tmp_path) / "splits.csv")
    } == first


def test_a_strict_run_stops_on_a_leak(
    small_prepared: PreparedBackbone, tmp_path: Path, cache_dir: Path
) -> None:
    data = tmp_path / "shapes"
    write_class_folders(data / "train", 8)
    write_class_folders(data / "val", 3, first_seed=20)
    run(options_of(data, tmp_path, cache_dir, strict=True))
    shutil.copy(data / "train" / "circle" / "0.jpeg", data / "val" / "circle" / "same.jpeg")
    with pytest.raises(
        GraftError,
        match=r"1 image leaks .*\n  .*same.jpeg: the same file as .*0.jpeg in train\n.*--strict "
        "stops here",
    ):
        run(options_of(data, tmp_path, cache_dir, strict=True))
    run(options_of(data, tmp_path, cache_dir))
    assert [row["kind"] for row in read_rows(newest_run(tmp_path) / "audit.csv")].count(
        "exact_leak"
    ) == 1


# Data of 12 bits in files of 16.


@pytest.fixture(scope="module")
def dark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-bit files: 12-bit data in two classes, which only its brightness tells apart."""
    folder = tmp_path_factory.mktemp("dark") / "photos"
    for highest, name in ((2_000, "left"), (4_095, "right")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            values = np.random.default_rng((highest, number)).integers(0, 900, (40, 40))
            values[:, :20] += (highest - 900) if name == "left" else 0
            values[:, 20:] += (highest - 900) if name == "right" else 0
            suffix = ("png", "tiff")[number % 2]
            Image.fromarray(values.astype(np.uint16)).save(folder / name / f"{number}.{suffix}")
    Image.fromarray(np.full((40, 40), 65_535, np.uint16)).save(folder / "left" / "bright.png")
    Image.new("RGB", (40, 40), (3, 3, 3)).save(folder / "left" / "eight bits.tiff")
    return folder


def test_an_image_that_uses_little_of_its_range_is_found(
    small_prepared: PreparedBackbone, dark: Path, cache_dir: Path, tmp_path: Path
) -> None:
    found = audit_of(dark, tmp_path, cache_dir)
    findings = found.of_kind("narrow_range")
    assert len(findings) == 16
    assert all(
        re.search(r"of 65,535: it uses \d\.\d% of its range", one.detail) for one in findings
    )
    assert "16 images nearly black (--stretch)" in found.summary
    assert not audit_of(dark, tmp_path, cache_dir, stretch=True).of_kind("narrow_range")


def test_a_stretched_run_is_served_as_it_was_trained(
    small_prepared: PreparedBackbone, dark: Path, cache_dir: Path, tmp_path: Path
) -> None:
    preprocesses = []
    for stretch in (False, True):
        checkpoint = run(
            Options(
                data=str(dark),
                image_size=SMALL_SIZE,
                output=tmp_path / "runs",
                repository=tmp_path / "checkpoints",
                cache_dir=cache_dir,
                precision="fp32",
                new_split=True,
                stretch=stretch,
            )
        )
        preprocesses.append(load_checkpoint(checkpoint).preprocess)
    plain, stretched = preprocesses
    assert (plain.stretch, stretched.stretch) == (False, True)
    data = (dark / "right" / "0.png").read_bytes()
    assert np.asarray(plain.open(data).pixels).max() == 15
    assert np.asarray(stretched.open(data).pixels).max() == 255


def test_an_audit_after_a_run_computes_no_image_anew(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_class_folders(tmp_path / "shapes", 8)
    options: dict[str, Any] = {
        "data": str(data),
        "image_size": SMALL_SIZE,
        "output": tmp_path / "runs",
        "cache_dir": cache_dir,
        "precision": "fp32",
    }
    run(Options(**options, repository=tmp_path / "checkpoints"))
    caplog.clear()
    with caplog.at_level("INFO", "graft"):
        audit(AuditOptions(**options))
    assert "features: 24 from the cache, 0 computed" in caplog.messages
