"""`python finetune/run.py` as it is typed: what it leaves behind, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from models.checkpoint import check_golden, list_versions, load_checkpoint, logits
from models.engine.engine import run
from models.engine.processor import supports_vnni
from models.prepared import build_engine
from tests.conftest import SMALL_SIZE, RunForked
from tests.support.forked import Program
from tests.support.images import draw_shape, write_class_folders, write_noise_folders
from tests.support.shared import HANG_SECONDS

ROOT = Path(__file__).parents[2]
Finetune = Callable[..., subprocess.CompletedProcess[str]]


def program(tmp_path: Path, cache_dir: Path, *arguments: object, **limits: Any) -> Program:
    folders = ("--output", tmp_path / "runs", "--repository", tmp_path / "checkpoints")
    return Program(
        path=str(ROOT / "finetune" / "run.py"),
        arguments=[str(part) for part in (*folders, "--cache-dir", cache_dir, *arguments)],
        cwd=str(tmp_path),
        env={"HF_HOME": str(tmp_path / "hf")},
        **limits,
    )


@pytest.fixture
def finetune(tmp_path: Path, cache_dir: Path, run_forked: RunForked) -> Finetune:
    def run(*arguments: object, **limits: Any) -> subprocess.CompletedProcess[str]:
        (done,) = run_forked(program(tmp_path, cache_dir, *arguments, **limits))
        return done

    return run


@pytest.fixture
def finetune_typed(tmp_path: Path, cache_dir: Path) -> Finetune:
    """As `finetune`, in a Python of its own that imports all by itself."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        typed = program(tmp_path, cache_dir, *arguments)
        return subprocess.run(
            [sys.executable, typed.path, *typed.arguments],
            cwd=typed.cwd,
            env={**os.environ, **typed.env},
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )

    return run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("data") / "Shapes of 3", 12)


def only_run(tmp_path: Path) -> Path:
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir


def read_metrics(tmp_path: Path) -> dict[str, dict[str, Any]]:
    text = (only_run(tmp_path) / "metrics.json").read_text()
    metrics: dict[str, dict[str, Any]] = json.loads(text)
    return metrics


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, a message with `parts` in it, and no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.long
def test_defaults_fit_the_digits(finetune_typed: Finetune, tmp_path: Path) -> None:
    done = finetune_typed()
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path)
    assert metrics["val"]["accuracy"] >= 0.94
    assert metrics["probe"]["accuracy"] == metrics["val"]["accuracy"]
    assert set(metrics["seconds"]) == {
        "total",
        "engine",
        "features",
        "probe",
        "audit",
        "learning_curve",
        "train",
    }
    assert {"balanced_accuracy", "macro_f1", "loss"} <= set(metrics["val"])
    low, high = metrics["val"]["intervals"]["accuracy"]
    assert low < metrics["val"]["accuracy"] < high
    assert f"val accuracy {metrics['val']['accuracy']:.4f} ({low:.3f} to {high:.3f})" in done.stdout
    assert metrics.get("verdict", 0) is None
    assert metrics["val"]["calibration"]["covered"] == pytest.approx(0.95, abs=0.03)
    assert metrics["learning_curve"]["num_images"][-1] == 1797 - metrics["val"]["num_images"]
    assert "with half the images the probe scores" in done.stdout
    reason = "int8 is tried where" if supports_vnni() else "this CPU has no VNNI"
    assert reason in metrics["precision"]["reason"]
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "digits" / "1")
    assert checkpoint.label_names == tuple("0123456789")
    assert (checkpoint.coverage, checkpoint.threshold) == (
        0.95,
        metrics["calibration"]["threshold"],
    )
    report = only_run(tmp_path) / "report.html"
    assert str(report) in done.stdout
    assert f"{metrics['val']['accuracy']:.4f} ({low:.3f} to {high:.3f})" in report.read_text()
    assert str(tmp_path / "checkpoints" / "digits" / "1") in done.stdout
    assert f"make -C {ROOT} serve" in done.stdout  # it was not started from there
    assert "curl" in done.stdout


@pytest.mark.long
def test_digits_gain_from_training_past_the_probe(finetune: Finetune, tmp_path: Path) -> None:
    # A probe on all levels is as good as the trained network here.
    done = finetune(
        *("--freeze", "until:blocks.3", "--epochs", 4, "--image-size", SMALL_SIZE),
        *("--levels", "last"),
    )
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path)
    assert metrics["verdict"]["published"] == "fine-tuned"
    assert metrics["verdict"]["fine_tuned_accuracy"] >= 0.985
    assert metrics["verdict"]["fine_tuned_accuracy"] > metrics["probe"]["accuracy"]
    assert metrics["verdict"]["interval"][0] > 0


def test_run_leaves_what_the_next_one_needs(
    finetune: Finetune, tmp_path: Path, shapes: Path
) -> None:
    assert finetune("--data", shapes).returncode == 0
    run_dir = only_run(tmp_path)
    assert run_dir.name.startswith("shapes-of-3-")
    assert any(path.name.startswith("events.out.tfevents") for path in run_dir.iterdir())
    again = finetune(
        "--config", run_dir / "config.yaml", "--data", run_dir / "splits.csv", "--name", "again"
    )
    assert again.returncode == 0, again.stderr
    second = next(path for path in (tmp_path / "runs").iterdir() if path != run_dir)
    first_rows, second_rows = ((path / "splits.csv").read_text() for path in (run_dir, second))
    assert first_rows == second_rows
    assert yaml.safe_load((second / "config.yaml").read_text())["name"] == "again"


def test_second_run_publishes_the_next_version(
    finetune: Finetune, tmp_path: Path, shapes: Path
) -> None:
    for _ in range(2):
        assert finetune("--data", shapes, "--name", "shapes").returncode == 0
    assert list_versions(tmp_path / "checkpoints", "shapes") == [1, 2]
    first, second = (
        load_checkpoint(tmp_path / "checkpoints" / "shapes" / str(version)) for version in (1, 2)
    )
    np.testing.assert_array_equal(first.head_weight, second.head_weight)
    assert first.fingerprint == second.fingerprint


def test_where_training_wins_it_is_published(finetune: Finetune, tmp_path: Path) -> None:
    """Random convolutions get 94 % of the digits right; training all but the first gets more."""
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\ndef build():\n    pooled = (nn.AvgPool2d(4), nn.Conv2d(3, 16, 3, "
        "2), nn.ReLU())\n    return nn.Sequential(*pooled, nn.Conv2d(16, 16, 3, 2), nn.ReLU(), "
        "nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    options = ("--backbone", "small_net:build", "--image-size", 48, "--name", "small")
    done = finetune(
        *options, "--freeze", "until:1", "--epochs", 8, "--lr", 0.01, "--backbone-lr", 0.01
    )
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path)
    assert metrics["verdict"]["published"] == "fine-tuned"
    assert metrics["verdict"]["interval"][0] > 0
    assert (
        metrics["val"]["accuracy"]
        == metrics["verdict"]["fine_tuned_accuracy"]
        > metrics["probe"]["accuracy"]
    )
    assert "fine-tuned is better and is published" in done.stdout
    assert "validation images" in metrics["calibration"]["fitted_on"]
    assert (
        load_checkpoint(tmp_path / "checkpoints" / "small" / "1").config["graft"]["freeze"]
        == "until:1"
    )
    assert finetune(*options).returncode == 0
    trained, probed = (
        load_file(tmp_path / "checkpoints" / "small" / version / "model.safetensors")
        for version in ("1", "2")
    )
    assert trained.keys() == probed.keys()
    frozen = {name for name in trained if ".1." in f".{name}"}
    assert len(frozen) == 2
    for name in trained:
        assert np.array_equal(trained[name], probed[name]) == (name in frozen), name


def test_on_a_tie_the_probe_is_published_as_if_nothing_had_been_trained(
    finetune: Finetune, tmp_path: Path
) -> None:
    data = write_noise_folders(tmp_path / "noise", 12, brighter=250)
    options = ("--data", data, "--backbone", "tests.support.tiny:build_trunk", "--name", "noise")
    done = finetune(*options, "--freeze", "until:stem", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "a tie, so the probe is published" in done.stdout
    metrics = read_metrics(tmp_path)
    assert metrics["verdict"]["published"] == "probe"
    assert metrics["val"]["accuracy"] == metrics["probe"]["accuracy"]
    assert finetune(*options).returncode == 0
    tied, probed = (
        load_checkpoint(tmp_path / "checkpoints" / "noise" / str(version)) for version in (1, 2)
    )
    assert tied.fingerprint == probed.fingerprint
    assert tied.config["graft"]["freeze"] == "backbone"
    np.testing.assert_array_equal(tied.head_weight, probed.head_weight)
    assert (tied.temperature, tied.threshold) == (probed.temperature, probed.threshold)


def test_int8_is_quantised_once_and_served_as_it_was_solved(
    finetune: Finetune, tmp_path: Path, shapes: Path
) -> None:
    small = ("--data", shapes, "--image-size", SMALL_SIZE)
    for name in ("int8", "again"):
        done = finetune(*small, "--precision", "int8", "--name", name)
        assert done.returncode == 0, done.stderr
    assert "quantised to int8" not in done.stderr
    first, second = (
        load_checkpoint(tmp_path / "checkpoints" / name / "1") for name in ("int8", "again")
    )
    assert first.engine["precision"] == "int8"
    assert first.fingerprint == second.fingerprint
    assert finetune(*small, "--name", "float").returncode == 0
    assert (
        load_checkpoint(tmp_path / "checkpoints" / "float" / "1").fingerprint != first.fingerprint
    )
    engine = build_engine(
        first.path, first.preprocess, first.config, device="cpu", precision="int8"
    )
    check_golden(
        first,
        logits(
            first, run(engine, np.stack([first.preprocess(image) for image in first.golden.images]))
        ),
    )
    engine.close()


def test_own_module_by_its_name(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 9, 8), "
        "nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())\n"
    )
    done = finetune(
        "--data",
        shapes,
        "--backbone",
        "mine.net:build",
        "--freeze",
        "until:1",
        "--epochs",
        1,
        "--name",
        "mine",
    )
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "mine" / "1")
    assert checkpoint.architecture == "mine.net:build"
    assert checkpoint.head_weight.shape == (3, 128)


def test_own_module_that_raises_is_named(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "broken_net.py").write_text("def build():\n    raise KeyError('no such layer')\n")
    done = finetune("--data", shapes, "--backbone", "broken_net:build")
    assert_refused(done, "--backbone broken_net:build", "KeyError", "broken_net.py:2")


def test_own_module_whose_code_changed_gets_features_of_its_own(
    finetune: Finetune, tmp_path: Path, shapes: Path
) -> None:
    for number, expression in enumerate(("images.mean((2, 3))", "images.mean((2, 3)) * 0 + 1")):
        (tmp_path / "changing.py").write_text(
            "from torch import nn\nclass Net(nn.Module):\n    def forward(self, images):\n       "
            f" return {expression}\nbuild = Net\n"
        )
        done = finetune(
            "--data", shapes, "--backbone", "changing:build", "--name", f"changing{number}"
        )
        assert done.returncode == 0, done.stderr
    first, second = (
        load_checkpoint(tmp_path / "checkpoints" / f"changing{number}" / "1") for number in (0, 1)
    )
    assert first.fingerprint != second.fingerprint
    assert "0 from the cache" in done.stderr


def test_nan_features_stop_the_run(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "nan_net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, images):\n"
        "        return images.mean((2, 3)) * float('nan')\nbuild = Net\n"
    )
    done = finetune("--data", shapes, "--backbone", "nan_net:build")
    assert_refused(
        done, "nan_net:build", "NaN or infinite", "circle", "its weights or its code are broken"
    )


def test_splits_of_a_run_are_read_back_from_anywhere(finetune: Finetune, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "photos", 6)
    assert finetune("--data", "photos").returncode == 0
    again = finetune("--data", only_run(tmp_path) / "splits.csv", "--name", "again")
    assert again.returncode == 0, again.stderr
    assert "unreadable" not in again.stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("-", "--data -: images are not read from standard input; name a folder or a CSV file"),
        ("base/*", "--data base/*: there is no such file or folder, and * and ? are not expanded"),
        ("Фото", "--data Фото: there is no such file or folder; or say digits"),
    ],
)
def test_data_that_are_not_there_are_named_before_a_name_is_asked_for(
    finetune: Finetune, data: str, message: str
) -> None:
    done = finetune("--data", data)
    assert done.returncode == 2
    assert message in done.stderr
    assert "--name" not in done.stderr


def test_a_run_that_fails_leaves_no_folder(
    finetune: Finetune, tmp_path: Path, shapes: Path
) -> None:
    assert finetune("--data", shapes, "--freeze", "until:layer9").returncode == 2
    assert list((tmp_path / "runs").iterdir()) == []


def test_weights_file_written_by_timm(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    import timm

    path = tmp_path / "resnet.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    done = finetune("--data", shapes, "--backbone", "test_resnet", "--weights", path)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "checkpoints" / "shapes-of-3" / "1" / "README.md").read_text()
    assert "file resnet.pth" in card
    assert "No pretrained weights" not in card


def test_no_pretrained_is_in_log_and_card(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    done = finetune("--data", shapes, "--backbone", "test_resnet", "--no-pretrained")
    assert done.returncode == 0, done.stderr
    assert "RANDOM weights" in done.stderr
    assert (
        "No pretrained weights"
        in (tmp_path / "checkpoints" / "shapes-of-3" / "1" / "README.md").read_text()
    )


def test_no_weights_to_be_had_names_three_ways_out(finetune: Finetune, shapes: Path) -> None:
    done = finetune("--data", shapes, "--backbone", "resnet18")
    assert_refused(done, "--weights FILE", "package", "Hugging Face hub", "--no-pretrained")


def test_unreadable_images_are_named_and_left_out(finetune: Finetune, tmp_path: Path) -> None:
    data = write_class_folders(tmp_path / "data", 8)
    (data / "circle" / "notes.txt").write_text("not an image at all")
    (data / "square" / "cut.jpg").write_bytes(draw_shape("square", 99)[:900])
    done = finetune("--data", data, "--name", "shapes")
    assert done.returncode == 0, done.stderr
    assert "2 unreadable images" in done.stderr
    assert "notes.txt: not an image" in done.stderr
    assert "cut.jpg" in done.stderr
    assert "notes.txt" not in (only_run(tmp_path) / "splits.csv").read_text()
    assert_refused(finetune("--data", data, "--strict"), "notes.txt", "--strict")
    assert list_versions(tmp_path / "checkpoints", "data") == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "nowhere"], ["--data nowhere", "no such file or folder"]),
        (["--backbone", "resnet81"], ["--backbone resnet81", "did you mean"]),
        (["--freeze", "until:layer9"], ["until:layer9", "blocks.4", "conv_head"]),
        (["--freeze", "everything"], ["--freeze everything", "until:NAME"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--name", "No Good"], ["--name 'No Good'"]),
        (["--nothing"], ["--nothing"]),
        (["--data", "torchvision:Nope"], ["torchvision:Nope", "FashionMNIST"]),
        (["--weights", "gone.pth", "--backbone", "resnet18"], ["gone.pth", "no such weights file"]),
        (["--device", "cuda"], ["cuda was asked for", "cpu"]),
        (["--precision", "int8", "--freeze", "none"], ["--precision int8", "--freeze backbone"]),
        (["--precision", "fp16"], ["--precision fp16", "runs fp32"]),
    ],
)
def test_wrong_option_is_answered_with_the_way_out(
    finetune: Finetune, shapes: Path, arguments: list[str], parts: list[str]
) -> None:
    if arguments[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    data = [] if "--data" in arguments else ["--data", shapes]
    assert_refused(finetune(*data, *arguments), *parts)


def test_empty_folder(finetune: Finetune, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(finetune("--data", tmp_path / "empty"), "no class folders")


def test_one_class(finetune: Finetune, tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "1.jpg").write_bytes(draw_shape("circle", 1))
    assert_refused(finetune("--data", tmp_path / "data"), "only one class", "'cat'")


def test_class_missing_in_val(finetune: Finetune, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_class_folders(data / "train", 3)
    write_class_folders(data / "val", 2, first_seed=10)
    for path in (data / "val" / "cross").iterdir():
        path.unlink()
    assert_refused(finetune("--data", data), "'cross'", "val/")


def test_unwritable_output(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(
        finetune("--data", shapes, "--output", tmp_path / "file" / "runs"), "--output", "can write"
    )


def test_full_disk_publishes_nothing(finetune: Finetune, tmp_path: Path, shapes: Path) -> None:
    assert finetune("--data", shapes, "--name", "warm").returncode == 0

    # The checkpoint's weights are 14 MB.
    done = finetune("--data", shapes, "--name", "full", max_file_bytes=4_000_000)
    assert_refused(done, "could not be written", "nothing was published")
    assert list((tmp_path / "checkpoints" / "full").iterdir()) == []


def test_ctrl_c_ends_with_a_line(tmp_path: Path, cache_dir: Path) -> None:
    command: list[str | Path] = [
        sys.executable,
        str(ROOT / "finetune" / "run.py"),
        "--output",
        tmp_path / "runs",
        "--repository",
        tmp_path / "checkpoints",
    ]
    process = subprocess.Popen(
        [*command, "--cache-dir", cache_dir], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("engine"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(HANG_SECONDS) == 130
    assert "Traceback" not in said
    assert "nothing was published" in said


def test_help_teaches(finetune_typed: Finetune) -> None:
    done = finetune_typed("--help")
    assert done.returncode == 0
    for word in ("--backbone", "--freeze", "until:NAME", "torchvision:NAME", "--no-pretrained"):
        assert word in done.stdout
