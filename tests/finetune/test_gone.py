"""Images that vanish, break or change during a run or before its resumption are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune.candidates
import finetune.report.publishing
import finetune.run
from finetune.resume import STATE_DIR, TRAINING_FILE
from finetune.training.loop import Training
from models.checkpoint import load_checkpoint
from tests.support.images import draw_noise, write_noise_folders

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = ["--freeze", "until:stem", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture
def arguments(tmp_path: Path, cache_dir: Path) -> list[str]:
    write_noise_folders(tmp_path / "photos", 8)
    folders = [
        "--output",
        str(tmp_path / "runs"),
        "--repository",
        str(tmp_path / "checkpoints"),
        "--cache-dir",
        str(cache_dir),
    ]
    return [
        *(
            "--data",
            str(tmp_path / "photos"),
            "--backbone",
            "tests.support.tiny:build_trunk",
            "--precision",
            "fp32",
            "--device",
            "cpu",
        ),
        *("--workers", "1", "--explain", "no", *folders),
    ]


def before(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    do: Callable[[], object],
    when: Callable[..., bool] = lambda *_: True,
) -> None:
    """Have something happen to the images just before a step of the run."""
    step = getattr(module, name)

    def stepped(*arguments: Any) -> Any:
        if when(*arguments):
            do()
        return step(*arguments)

    monkeypatch.setattr(module, name, stepped)


def break_all(tmp_path: Path) -> None:
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"no image")


def change_all(tmp_path: Path) -> None:
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(draw_noise(0, 1000 + int(path.stem)))


def remove_all(tmp_path: Path) -> None:
    for folder in (tmp_path / "photos").iterdir():
        shutil.rmtree(folder)


@pytest.mark.parametrize("spoil", [remove_all, break_all, change_all])
def test_a_checkpoint_is_not_published_with_images_that_were_not_measured(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
) -> None:
    before(monkeypatch, finetune.report.publishing, "choose_golden", lambda: spoil(tmp_path))
    assert finetune.run.main(arguments) == 2
    assert f"{tmp_path}/photos" in (said := capsys.readouterr().err)
    assert "gone or changed since the run began; nothing was published" in said
    assert not (tmp_path / "checkpoints" / "photos").exists()


def test_one_that_changed_is_left_out_of_the_golden_images(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = finetune.report.publishing.choose_golden

    def change_first(result: Any, *rest: Any) -> Any:
        Path(result.splits.val[0].key).write_bytes(draw_noise(0, 1000))
        return choose(result, *rest)

    monkeypatch.setattr(finetune.report.publishing, "choose_golden", change_first)
    assert finetune.run.main(arguments) == 0
    golden = load_checkpoint(tmp_path / "checkpoints" / "photos" / "1").golden
    assert draw_noise(0, 1000) not in golden.images
    assert len(golden.images) == len(golden.logits) > 0


@pytest.mark.parametrize("spoil", [remove_all, break_all])
def test_pictures_of_mistakes_go_without_images_that_are_gone(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
) -> None:
    before(monkeypatch, finetune.run, "worst_mistakes", lambda: spoil(tmp_path))
    assert finetune.run.main(arguments) == 0
    (report,) = (tmp_path / "runs").glob("*/report.html")
    assert report.stat().st_size > 0


@pytest.mark.parametrize("spoil", [remove_all, break_all])
@pytest.mark.parametrize(
    ("name", "flags"), [("_first_head", []), ("_train_epoch", ["--no-cache"]), ("_train_epoch", [])]
)
def test_an_image_that_cannot_be_read_again_is_named(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    name: str,
    flags: list[str],
) -> None:
    before(
        monkeypatch,
        Training if name == "_train_epoch" else finetune.candidates,
        name,
        lambda: spoil(tmp_path),
    )
    assert finetune.run.main([*arguments, *TRAINED, *flags]) == 2
    printed = capsys.readouterr().err.partition("error: ")[2]
    assert printed.startswith(f"{tmp_path}/photos/")
    assert "gone or changed since the run began" in printed
    assert "; put back what was there" in printed
    assert "Traceback" not in printed
    assert ("--resume" in printed) == (name == "_train_epoch")


def test_the_tuned_candidate_is_not_measured_on_other_images_than_the_probe(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before(monkeypatch, Training, "_train_epoch", lambda: change_all(tmp_path))
    assert finetune.run.main([*arguments, *TRAINED]) == 2
    assert "gone or changed since the run began; put back what was there" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "photos").exists()


def test_a_resume_refuses_images_that_changed(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before(
            patch,
            Training,
            "_train_epoch",
            stop,
            lambda training: training.progress.epoch == 2,
        )
        assert finetune.run.main([*arguments, *TRAINED]) == 130
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / STATE_DIR / TRAINING_FILE).is_file()
    changed = tmp_path / "photos" / "green" / "3.png"
    was = changed.read_bytes()
    changed.write_bytes(draw_noise(1, 1000))
    assert finetune.run.main(["--resume", str(run_dir)]) == 2
    assert (
        f"images have changed since the run began: {changed}; put them back as they were"
        in capsys.readouterr().err
    )
    changed.write_bytes(was)
    assert finetune.run.main(["--resume", str(run_dir)]) == 0
