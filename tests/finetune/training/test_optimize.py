"""Stages that wait do not move at all, and each has the rate of its depth."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from finetune.command_line import parse_options
from finetune.config import Options
from finetune.training.optimize import open_stages
from models.backbone.build import Backbone
from models.backbone.custom import CustomNetwork
from models.backbone.freezing import depths, freeze, parameter_groups, set_train_mode
from models.errors import GraftError
from tests.support.tiny import (
    PREPROCESS,
    Recorder,
    build,
    draw_splits,
    options,
    probe_of,
    snapshot,
    train_tiny,
)

RATES: dict[str, Any] = {"head_lr": 0.5, "backbone_lr": 0.25, "weight_decay": 0.125}


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------- depths


@pytest.mark.parametrize(
    ("name", "classifier", "expected"),
    [
        # Norms count with what they follow.
        (
            "resnet18",
            "fc",
            {
                "fc": 0,
                "layer4.1.conv2": 1,
                "layer3": 2,
                "layer1.0.bn1": 4,
                "bn1": 5,
                "conv1": 5,
                "": 5,
            },
        ),
        (
            "tf_efficientnet_lite0",
            "classifier",
            {
                "bn2": 1,
                "conv_head": 1,
                "blocks.6.0.conv_pw": 2,
                "blocks.0": 8,
                "bn1": 9,
                "global_pool": 1,
            },
        ),
        # The tokens stand in the network itself.
        (
            "test_vit",
            "head",
            {
                "head": 0,
                "norm": 1,
                "blocks.5.norm2": 1,
                "blocks.0": 6,
                "patch_embed.proj": 7,
                "": 7,
            },
        ),
        # A norm beside the classifier.
        (
            "test_convnext",
            "head.fc",
            {"head.fc": 0, "head.norm": 1, "stages.3": 1, "stages.0.blocks.0.norm": 4, "stem.0": 5},
        ),
    ],
)
def test_depth_counts_stages_from_the_end(
    name: str, classifier: str, expected: dict[str, int]
) -> None:
    model = timm.create_model(name, num_classes=3)
    found = depths(model, classifier)
    assert {module: found[module] for module in expected} == expected
    assert set(found) == {module for module, _ in model.named_modules()}


def test_a_users_own_module_has_depths_too() -> None:
    found = depths(build().model, "head", "backbone.")
    assert {
        name: found[name] for name in ("head", "backbone.tail.0", "backbone.stem.1", "backbone")
    } == {
        "head": 0,
        "backbone.tail.0": 1,
        "backbone.stem.1": 2,
        "backbone": 2,
    }
    bare = CustomNetwork(nn.Conv2d(3, 8, 3), 8)
    assert depths(bare, "head", "backbone.") == {"": 1, "backbone": 1, "head": 0}


# -------------------------------------------------------------------------------------------- rates


def test_rates_fall_with_depth_and_every_parameter_has_one() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    freeze(model, "until:blocks.1", "head")
    groups = {
        group["name"]: group for group in parameter_groups(model, "head", **RATES, layer_decay=0.5)
    }
    rates = {
        name: group["lr"] for name, group in groups.items() if not str(name).endswith("_no_decay")
    }
    assert rates == {
        "head": 0.5,
        "backbone_1": 0.25,
        "backbone_2": 0.125,
        "backbone_3": 0.0625,
        "backbone_4": 0.03125,
    }
    for name, group in groups.items():
        assert group["lr"] == rates[str(name).removesuffix("_no_decay")]
        assert group["weight_decay"] == (0 if str(name).endswith("_no_decay") else 0.125)
    owner = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {
        owner[id(parameter)]: name
        for name, group in groups.items()
        for parameter in group["params"]
    }
    assert held["blocks.5.mlp.fc1.weight"] == "backbone_1"
    assert held["norm.weight"] == "backbone_1_no_decay"
    assert held["blocks.2.attn.qkv.bias"] == "backbone_4_no_decay"
    assert sum(len(group["params"]) for group in groups.values()) == len(held)
    assert set(held) == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def fit(
    folder: Path, backbone: Backbone | None = None, **changes: Any
) -> tuple[Backbone, list[dict[str, torch.Tensor]], Recorder]:
    """Train, and give the network, its tensors after each step, and the curves."""
    backbone = backbone or build()
    steps = [snapshot(backbone)]
    folder.mkdir(exist_ok=True)
    monitor = Recorder(folder, lambda num_steps: steps.append(snapshot(backbone)))
    try:
        train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(**{"freeze": "none", **changes}),
            monitor,
            folder,
        )
    finally:
        monitor.close()
    return backbone, steps, monitor


def test_a_run_has_the_rates_of_its_layer_decay(tmp_path: Path) -> None:
    _, _, monitor = fit(tmp_path, layer_decay=0.25, epochs=1)
    peak = {
        tag: max(rate for _, rate in points)
        for tag, points in monitor.curves.items()
        if tag.startswith("rate/")
    }
    assert set(peak) == {
        f"rate/{name}{kind}"
        for name in ("head", "backbone_1", "backbone_2")
        for kind in ("", "_no_decay")
    }
    assert peak["rate/backbone_2"] == pytest.approx(0.25 * peak["rate/backbone_1"])
    assert peak["rate/head"] == pytest.approx(2.5 * peak["rate/backbone_1"])


# ------------------------------------------------------------------------------------------ gradual


@pytest.mark.parametrize("batch_norm", ["keep", "update"])
def test_a_stage_that_waits_does_not_move_at_all_and_then_does(
    tmp_path: Path, batch_norm: str
) -> None:
    """Four steps an epoch; the stem joins in the third."""
    _, steps, _ = fit(tmp_path, gradual=2, epochs=3, batch_norm=batch_norm, weight_decay=0.5)
    stem = [name for name in steps[0] if name.startswith("backbone.stem")]
    assert all(torch.equal(steps[8][name], steps[0][name]) for name in stem)
    moved = {name for name in steps[0] if not torch.equal(steps[12][name], steps[8][name])}
    assert moved >= {"backbone.stem.0.weight", "backbone.stem.1.bias", "head.weight"}
    assert ("backbone.stem.1.running_mean" in moved) == (batch_norm == "update")
    assert not torch.equal(steps[1]["backbone.tail.0.weight"], steps[0]["backbone.tail.0.weight"])


def test_the_first_epochs_equal_those_with_waiting_stages_frozen(tmp_path: Path) -> None:
    _, waiting, _ = fit(tmp_path / "gradual", gradual=2, epochs=2, augment="none")
    _, frozen, _ = fit(
        tmp_path / "frozen", freeze="until:stem", cache=False, epochs=2, augment="none"
    )
    for one, other in zip(waiting, frozen, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_waiting_stages_have_no_optimizer_state() -> None:
    backbone = build()
    freezing = freeze(backbone.model, "none", "head", "backbone.")
    optimizer = torch.optim.AdamW(parameter_groups(backbone.model, "head", **RATES))
    for epoch, expected in ((1, {"tail", "head"}), (2, {"stem", "tail", "head"})):
        set_train_mode(
            backbone.model,
            open_stages(backbone, freezing, 1, epoch),
            update_batch_norm=True,
        )
        assert backbone.model.get_submodule("backbone.stem.1").training == (epoch == 2)
        backbone.model(torch.rand(4, 3, PREPROCESS.height, PREPROCESS.width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        names = {
            name: parameter
            for name, parameter in backbone.model.named_parameters()
            if parameter in optimizer.state
        }
        assert {name.removeprefix("backbone.").split(".")[0] for name in names} == expected


def test_frozen_stages_never_join(tmp_path: Path) -> None:
    before = snapshot(build())
    backbone, _, _ = fit(tmp_path, gradual=1, epochs=3, freeze="until:stem")
    assert all(
        torch.equal(tensor, snapshot(backbone)[name])
        for name, tensor in before.items()
        if name.startswith("backbone.stem")
    )


@pytest.mark.parametrize(
    ("epochs", "level", "message"),
    [
        (3, logging.INFO, "--gradual 2: 2 of 2 stages will have trained in the end"),
        (
            2,
            logging.WARNING,
            "--gradual 2: 1 of 2 stages will have trained in the end; --epochs 3 would reach all "
            "of them",
        ),
    ],
)
def test_the_number_of_stages_to_be_trained_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epochs: int, level: int, message: str
) -> None:
    with caplog.at_level(logging.INFO, "graft.optimize"):
        fit(tmp_path, gradual=2, epochs=epochs)
    assert [
        (record.levelno, record.message)
        for record in caplog.records
        if record.name == "graft.optimize"
    ] == [(level, message)]


@pytest.mark.parametrize("given", ["--gradual 1", "--layer-decay 0.5"])
def test_without_gradient_epochs_they_are_refused(given: str) -> None:
    with pytest.raises(
        GraftError,
        match=rf"^{given}: it is for gradient epochs, and --freeze backbone has none; say --freeze "
        rf"until:NAME",
    ):
        parse_options(Options, given.split())
    with pytest.raises(GraftError, match=r"^--layer-decay 1\.5: it must be a number above 0 to 1$"):
        parse_options(Options, ["--freeze", "none", "--layer-decay", "1.5"])
