"""An option without effect on a run is named before any work; every option is decided on."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.command_line import parse_options
from finetune.config import AuditOptions, CompareOptions, Options, flag_of
from finetune.data.splits import load_splits
from finetune.run import run
from finetune.unused import (
    EPOCH_OPTIONS,
    SPLIT_OPTIONS,
    find_unused,
    warn_if_nothing_is_stretched,
    warn_if_service_takes_less,
    warn_if_split_is_given,
    warn_if_unused,
)
from models.errors import GraftError
from models.images import MAX_PIXELS
from tests.support.images import write_noise_folders

# A value of every option that is not its default.
OTHER = {
    "data": "torchvision:FakeData",
    "data_root": "elsewhere",
    "val_fraction": "0.3",
    "image_size": "64",
    "device": "cpu",
    "precision": "fp32",
    "workers": "7",
    "seed": "3",
    "output": "elsewhere",
    "cache_dir": "elsewhere",
    "cache_gb": "1",
    "backbone": "resnet18",
    "weights": "other.pth",
    "freeze": "none",
    "epochs": "20",
    "batch_size": "8",
    "lr": "0.1",
    "backbone_lr": "0.1",
    "weight_decay": "0",
    "batch_norm": "update",
    "balance": "weights",
    "label_smoothing": "0.1",
    "mix": "mixup",
    "ema": "0.9",
    "gradual": "1",
    "layer_decay": "0.7",
    "head_init": "probe",
    "augment": "flip",
    "views": "4",
    "levels": "auto",
    "fit": "auto",
    "coverage": "0.9",
    "name": "other",
    "repository": "elsewhere",
    "publish": "probe",
    "save_minutes": "1",
    "explain": "yes",
}
SWITCHES = {
    "new_split": "--new-split",
    "new_labels": "--new-labels",
    "strict": "--strict",
    "stretch": "--stretch",
    "cache": "--no-cache",
    "pretrained": "--no-pretrained",
    "preflight": "--preflight",
}
# What every run uses, whatever the other options are.
ALWAYS = {
    "data",
    "val_fraction",
    "image_size",
    "device",
    "precision",
    "workers",
    "seed",
    "output",
    "backbone",
    "weights",
    "freeze",
    "balance",
    "levels",
    "fit",
    "coverage",
    "name",
    "repository",
    "explain",
    "new_split",
    "new_labels",
    "strict",
    "stretch",
    "cache",
}


def _encode(dtype: type[np.integer], kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(4, dtype=dtype).reshape(2, 2)).save(file, kind)
    return file.getvalue()


def warnings_of(caplog: pytest.LogCaptureFixture, arguments: list[str]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_if_unused(parse_options(Options, arguments))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", sorted(Options.model_fields.keys() - {"config", "resume"}))
def test_each_option_is_used_warned_about_or_refused_with_a_frozen_backbone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = [SWITCHES[name]] if name in SWITCHES else [flag_of(name), OTHER[name]]
    warned: list[str] = []
    try:
        warned = warnings_of(caplog, given)
    except GraftError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert (name in EPOCH_OPTIONS, refused.startswith(given[0])) == (True, True)
        return
    expected = name in EPOCH_OPTIONS | {"augment", "data_root"}
    assert expected == any(line.startswith(f"{' '.join(given)} has no effect: ") for line in warned)
    assert len(warned) == int(expected)
    assert expected or name in ALWAYS | {"views", "cache_dir", "cache_gb", "pretrained"}


@pytest.mark.parametrize("name", sorted(EPOCH_OPTIONS | {"augment", "views"}))
def test_no_option_of_gradient_epochs_is_warned_about_where_layers_train(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = [SWITCHES[name]] if name in SWITCHES else [flag_of(name), OTHER[name]]
    assert warnings_of(caplog, ["--freeze", "none", *given]) == []


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        ("", []),
        ("--epochs 5", ["--epochs 5"]),  # the default, but its user expects five epochs
        ("--epochs 20 --lr 0.1 --augment flip", ["--epochs 20", "--lr 0.1", "--augment flip"]),
        ("--views 4 --augment flip", []),
        ("--views 4 --augment none", ["--views 4"]),
        ("--freeze none --views 4 --augment none", ["--views 4"]),
        ("--no-cache --cache-dir c --cache-gb 1", ["--cache-dir c", "--cache-gb 1"]),
        ("--data-root d", ["--data-root d"]),
        ("--data torchvision:MNIST --data-root d", []),
        ("--weights w.pth --no-pretrained", ["--no-pretrained"]),
        ("--backbone my.networks:small --no-pretrained", ["--no-pretrained"]),
        ("--publish probe", ["--publish probe"]),
        ("--head-init probe --save-minutes 1", ["--head-init probe", "--save-minutes 1"]),
    ],
)
def test_options_that_the_others_make_void_are_named(
    arguments: str, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = warnings_of(caplog, arguments.split())
    assert sorted(line.partition(" has no effect: ")[0] for line in lines) == sorted(warned)
    assert all("; " in line and "\n" not in line for line in lines)


def test_a_runs_own_config_warns_of_what_was_changed_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(Options(lr=0.25).to_yaml())
    (line,) = warnings_of(caplog, ["--config", str(config)])
    assert line == (
        "--lr 0.25 has no effect: --freeze backbone has no gradient epochs; say --freeze "
        "until:NAME or none"
    )


def test_comparing_and_auditing_know_what_they_do_not_use() -> None:
    for kind in (CompareOptions, AuditOptions):
        assert find_unused(kind(cache=False)).keys() == {"cache_dir", "cache_gb", "data_root"}


def test_options_of_a_drawn_split_are_named_where_the_data_has_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_if_split_is_given(parse_options(Options, ["--data", "photos", "--val-fraction", "0.3"]))
    assert caplog.messages == [
        "--val-fraction 0.3 has no effect: photos has a val split of its own; leave it out"
    ]
    assert Options.model_fields.keys() >= SPLIT_OPTIONS


def test_a_fraction_is_named_where_an_earlier_run_has_split_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {
        "data": str(write_noise_folders(tmp_path / "data", 6)),
        "backbone": "test_efficientnet",
        "pretrained": False,
        "image_size": 64,
        "output": tmp_path / "runs",
        "repository": tmp_path / "checkpoints",
    }
    reason = "images stay where an earlier run had them; --new-split draws anew"
    for changes, is_said in (({}, False), ({"new_split": True}, False), ({}, True)):
        caplog.clear()
        run(Options(**given, val_fraction=0.3, **changes))
        assert (f"--val-fraction 0.3 has no effect: {reason}" in caplog.messages) == is_said


@pytest.mark.parametrize(
    ("name", "data", "is_used"),
    [
        ("grey8.png", _encode(np.uint8, "PNG"), False),
        ("grey16.png", _encode(np.uint16, "PNG"), True),
        ("grey8.pgm", b"P5 2 2 255\n" + bytes(4), False),
        ("grey16.pgm", b"P5 2 2 4095\n" + bytes(8), True),
        ("commented.pgm", b"P5 # 12 bits\n2 2 4095\n" + bytes(8), True),
        ("text.pgm", b"P2\n2 2\n65535\n0 1 2 65535\n", True),
        ("colour.ppm", b"P6 2 2 255\n" + bytes(12), False),
        ("grey8.tif", _encode(np.uint8, "TIFF"), False),
        ("grey16.tif", _encode(np.uint16, "TIFF"), True),
        ("broken.png", _encode(np.uint16, "PNG")[:40], False),
    ],
)
def test_stretch_is_named_where_no_image_has_more_than_8_bits(
    tmp_path: Path, name: str, data: bytes, is_used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("cat", "dog"):
        for number in range(2):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{number}-{name}").write_bytes(data)
    splits = load_splits(str(tmp_path), data_root=tmp_path, val_fraction=0.5, seed=0)
    warn_if_nothing_is_stretched(parse_options(Options, ["--data", "photos", "--stretch"]), splits)
    assert caplog.messages == (
        []
        if is_used
        else [
            "--stretch has no effect: no image of photos has more than 8 bits a channel; leave it "
            "out"
        ]
    )


@pytest.mark.parametrize(
    ("limit", "num_warnings"), [("", 0), (MAX_PIXELS - 1, 0), (MAX_PIXELS, 0), (MAX_PIXELS + 1, 1)]
)
def test_a_run_that_takes_larger_images_than_the_service_says_so(
    limit: int | str,
    num_warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GRAFT_MAX_PIXELS", str(limit))
    warn_if_service_takes_less()
    assert [f"GRAFT_MAX_PIXELS={limit}: " in one for one in caplog.messages] == num_warnings * [
        True
    ]


def test_a_variable_that_is_nearly_a_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAFT_MAX_PIXEL", "5")
    monkeypatch.setenv("GRAFT_DEVICE", "cpu")
    warn_if_unused(Options())
    assert caplog.messages == ["GRAFT_MAX_PIXEL has no effect: did you mean GRAFT_MAX_PIXELS?"]
