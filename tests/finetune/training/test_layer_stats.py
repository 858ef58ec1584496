"""Statistics of layers equal plain arithmetic, change nothing, and warn of trouble."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from finetune.training.layer_stats import LayerStats, channel_dim
from finetune.training.state import Progress
from models.backbone.build import Backbone
from models.backbone.custom import CustomNetwork
from models.backbone.freezing import freeze, set_train_mode
from models.errors import GraftError
from models.preprocess import Preprocess
from tests.support.tiny import (
    LABELS,
    Recorder,
    build,
    draw_splits,
    options,
    probe_of,
    snapshot,
    train_tiny,
)

FIRST = Progress(8, 8, epoch=1)
LATER = Progress(8, 8, epoch=1, batch=3, step=3)
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


def step(
    backbone: Backbone,
    folder: Path,
    progress: Progress = FIRST,
    policy: str = "none",
    num_parts: int = 1,
) -> dict[str, float]:
    """One measured gradient step; gives the only point of each curve."""
    freezing = freeze(backbone.model, policy, backbone.classifier, backbone.module_prefix)
    monitor = Recorder(folder)
    layer_stats = LayerStats(backbone, freezing, 0.02, monitor)
    set_train_mode(backbone.model, freezing, update_batch_norm=False)
    optimizer = torch.optim.SGD(
        [parameter for parameter in backbone.model.parameters() if parameter.requires_grad], lr=0.1
    )
    with layer_stats.watch(progress) as read_gradients:
        for part in IMAGES.chunk(num_parts):
            (backbone.model(part).square().sum() / len(IMAGES)).backward()
        read_gradients()
        optimizer.step()
    assert not any(module._forward_hooks for module in backbone.model.modules())
    monitor.close()
    return {tag: value for tag, [(_, value)] in monitor.curves.items()}


def own(trunk: nn.Module, num_features: int) -> Backbone:
    torch.manual_seed(0)
    model = CustomNetwork(trunk, num_features)
    model.reset_classifier(len(LABELS))
    return Backbone(
        "own:trunk", model, "head", Preprocess(height=32, width=32), "none", None, "backbone."
    )


def test_the_figures_are_those_of_plain_arithmetic(tmp_path: Path) -> None:
    backbone = build(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    )
    first, relu, second = backbone.model.backbone[:3]  # type: ignore[index]
    with torch.no_grad():
        first.bias[:3] = -100.0
        before = {
            name: torch.cat([weight.flatten() for weight in module.parameters()])
            for name, module in (("0", first), ("2", second))
        }
        outputs = {"0": first(IMAGES), "2": second(relu(first(IMAGES)))}
    found = step(backbone, tmp_path)
    for name, module in (("0", first), ("2", second)):
        gradients = torch.cat([weight.grad.flatten() for weight in module.parameters()])
        assert found[f"inside_activation/{name}"] == pytest.approx(
            float(outputs[name].abs().mean()), rel=1e-4
        )
        assert found[f"inside_gradient/{name}"] == pytest.approx(float(gradients.norm()), rel=1e-4)
        moved = 0.1 * gradients.norm() / before[name].norm()
        assert found[f"inside_update/{name}"] == pytest.approx(float(moved), rel=1e-3)
    # The ReLU has no weights: its units are those of the stage before it.
    assert (found["inside_dead/0"], found["inside_dead/2"]) == (0.5, 0.0)
    assert {tag.partition("/")[2] for tag in found} == {"0", "2", "head"}
    assert "inside_dead/head" not in found


def test_a_batch_in_parts_is_seen_as_one(tmp_path: Path) -> None:
    whole, parts = (step(build(), tmp_path / str(num), num_parts=num) for num in (1, 4))
    assert whole == pytest.approx(parts, rel=1e-4)


def test_between_measured_steps_nothing_is_hooked_or_written(tmp_path: Path) -> None:
    assert step(build(), tmp_path, LATER) == {}


@pytest.mark.parametrize(
    ("name", "policy", "first"),
    [("resnet18", "until:layer2", "layer3"), ("test_vit", "until:blocks.2", "blocks.3")],
)
def test_stages_are_those_that_can_be_frozen_and_train(
    tmp_path: Path, name: str, policy: str, first: str
) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=3, **sizes)
    classifier = model.pretrained_cfg["classifier"]
    found = step(
        Backbone(name, model, classifier, Preprocess(height=32, width=32), "none", None),
        tmp_path,
        policy=policy,
    )
    stages = [tag.partition("/")[2] for tag in found if tag.startswith("inside_activation/")]
    assert (stages[0], stages[-1]) == (first, classifier)
    assert all(
        f"inside_{kind}/{stage}" in found for kind in ("gradient", "update") for stage in stages
    )


@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 5, 5), (4, 5, 7), (4, 5, 5, 7), (4, 7, 1, 1)])
def test_units_are_found_in_outputs_of_any_layout(shape: tuple[int, ...]) -> None:
    assert shape[channel_dim(torch.zeros(shape))] == 7


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_is_bit_by_bit_the_same_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    """Dropout draws random numbers, and BatchNorm keeps statistics."""

    def fit(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        folder.mkdir()
        backbone, monitor = build(), Recorder(folder)
        train_tiny(
            backbone, draw_splits(), probe_of(backbone), options(cache=cache), monitor, folder
        )
        monitor.close()
        return snapshot(backbone), monitor.curves

    tensors, curves = fit(tmp_path / "with")
    assert [index for index, _ in curves["inside_activation/tail"]] == [0, 4]  # four steps an epoch
    assert ("inside_activation/stem" in curves) is False
    monkeypatch.setattr(LayerStats, "_report", lambda *_: None)
    monkeypatch.setattr("finetune.training.layer_stats._place_hooks", lambda *_: None)
    plain, plain_curves = fit(tmp_path / "without")
    assert not [tag for tag in plain_curves if tag.startswith("inside")]
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)
    assert curves["train/loss"] == plain_curves["train/loss"]


def run_steps(
    backbone: Backbone, folder: Path, caplog: pytest.LogCaptureFixture, progress: Progress = FIRST
) -> str:
    with caplog.at_level(logging.WARNING, "graft"):
        step(backbone, folder, progress)
    return caplog.text


def test_a_healthy_network_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_steps(build(), tmp_path, caplog) == ""


@pytest.mark.parametrize(
    ("progress", "remedy"),
    [
        (FIRST, "do the weights belong to this network"),
        (Progress(8, 8, 2, 0, 50), "lower --backbone-lr"),
    ],
)
def test_a_stage_of_dead_units_is_named_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, progress: Progress, remedy: str
) -> None:
    backbone = build()
    with torch.no_grad():
        backbone.model.get_submodule("backbone.tail.1").bias[:6] = -50.0  # type: ignore[operator]
    said = run_steps(backbone, tmp_path, caplog, progress)
    assert "75% of the units of tail are dead" in said
    assert remedy in said


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ((1e-7, 100.0), "explode in the backward pass: "),
        ((1e3, 1e-4), "vanish in the backward pass: "),
    ],
)
def test_gradients_that_explode_or_vanish_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scales: tuple[float, float], words: str
) -> None:
    """Scaled weights: a gradient is the product of the weights behind it and the input."""
    convolutions = (nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 8, 3, bias=False))
    backbone = own(nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8)
    with torch.no_grad():
        stages = backbone.model.backbone[:2]  # type: ignore[index]
        for module, scale in zip(stages, scales, strict=True):
            module.weight *= scale
    assert words in run_steps(backbone, tmp_path, caplog)


class Hides(nn.Module):
    """What its stem overflows to does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.tail = nn.Conv2d(6, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(self.stem(images).clamp(-1, 1)).mean(dim=(2, 3))
        return features


def test_a_stage_with_infinite_output_is_named_though_the_loss_is_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = own(Hides(), 8)
    with torch.no_grad():
        backbone.model.get_submodule("backbone.stem").bias[0] = torch.inf  # type: ignore[operator]
    said = run_steps(backbone, tmp_path, caplog)
    assert (
        "the first stage whose output is NaN or infinite is stem, though the loss is finite; lower "
        "--backbone-lr" in said
    )


def test_each_kind_of_trouble_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    freezing = freeze(build().model, "none", "head", "backbone.")
    layer_stats = LayerStats(build(), freezing, 0.02, Recorder(tmp_path))
    with caplog.at_level(logging.WARNING, "graft"):
        for progress in (FIRST, LATER):
            layer_stats._warn_of_dead({"tail": 0.8}, progress)
    assert caplog.text.count("are dead") == 1


@pytest.mark.parametrize("cache", [True, False])
def test_a_broken_loss_names_the_stage_that_broke_first(tmp_path: Path, cache: bool) -> None:
    backbone = build()
    with pytest.raises(
        GraftError,
        match=r"the loss is nan.*; the first stage whose output is NaN or infinite is tail; ",
    ):
        train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(lr=1e-3, backbone_lr=1e38, cache=cache),
            Recorder(tmp_path),
            tmp_path,
        )


class Root(nn.Module):
    """Its output is finite, its gradient at zero is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.tail = nn.Conv2d(6, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail((self.stem(images) * 0).sqrt()).mean(dim=(2, 3))
        return features


def test_a_broken_gradient_names_the_stage_that_it_reaches_first(tmp_path: Path) -> None:
    backbone = own(Root(), 8)
    with pytest.raises(
        GraftError,
        match=r"the gradient is nan.*; in the backward pass, gradients are first NaN or infinite "
        r"in stem; ",
    ):
        train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(freeze="none"),
            Recorder(tmp_path),
            tmp_path,
        )
