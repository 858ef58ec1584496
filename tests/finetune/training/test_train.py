"""Gradient epochs keep the best epoch, move only what may move, and fail in words."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.evaluation.class_metrics import ClassMetrics, evaluate_classes
from finetune.monitor import Monitor
from finetune.probe.solve import Probe
from models.backbone.build import Backbone
from models.backbone.custom import CustomNetwork
from models.backbone.freezing import FrozenDriftError
from models.errors import GraftError
from models.preprocess import Preprocess
from models.sources import EncodedImage
from tests.support.images import draw_noise
from tests.support.tiny import train_tiny

SIZE = 24
LABELS = ("red", "green", "blue")
PREPROCESS = Preprocess(height=SIZE, width=SIZE)
NUM_FEATURES = 8


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(self.stem(images)).mean(dim=(2, 3))
        return features


class Counting(nn.Module):
    """It updates a buffer of its own in forward, frozen or not."""

    def __init__(self) -> None:
        super().__init__()
        self.num_seen: torch.Tensor
        self.register_buffer("num_seen", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_seen += 1
        return images


def build(trunk: nn.Module | None = None) -> Backbone:
    torch.manual_seed(0)
    model = CustomNetwork(Trunk() if trunk is None else trunk, NUM_FEATURES)
    model.reset_classifier(len(LABELS))
    return Backbone("own:trunk", model, "head", PREPROCESS, "none", None, "backbone.")


def draw_samples(split: str, count: int, first_seed: int, shift: int = 0) -> tuple[Sample, ...]:
    """Images with their labels moved on by `shift` classes."""
    return tuple(
        Sample(
            f"{split} {label} {seed}",
            (label + shift) % len(LABELS),
            EncodedImage(draw_noise(label, seed, size=SIZE)),
        )
        for seed in range(first_seed, first_seed + count)
        for label in range(len(LABELS))
    )


def draw_splits(shift: int = 0) -> Splits:
    return Splits(LABELS, draw_samples("train", 12, 0, shift), draw_samples("val", 6, 100))


def probe_of(backbone: Backbone) -> Probe:
    """The network's own head, as if a probe had been solved to it."""
    weight, bias = (
        tensor.detach().numpy().copy() for tensor in (backbone.head.weight, backbone.head.bias)
    )
    return Probe(weight, bias, 1.0, np.zeros((0, len(LABELS)), np.float32), 1.0)


def options(**changes: Any) -> Options:
    defaults: dict[str, Any] = {
        "freeze": "until:stem",
        "epochs": 2,
        "batch_size": 6,
        "lr": 0.05,
        "backbone_lr": 0.02,
        "workers": 1,
    }
    defaults |= {"precision": "fp32", "augment": "none", "device": "cpu"}
    return Options(**{**defaults, **changes})


class Recorder(Monitor):
    """It keeps the curves beside writing them."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.curves: dict[str, list[float]] = {}

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        super().scalar(tag, value, step)
        self.curves.setdefault(tag, []).append(value)


def fit(
    backbone: Backbone, splits: Splits, scratch: Path, start: Probe | None = None, **changes: Any
) -> tuple[int, dict[str, list[float]]]:
    """Train, and give the best epoch and the curves."""
    monitor = Recorder(scratch)
    try:
        return train_tiny(
            backbone, splits, start or probe_of(backbone), options(**changes), monitor, scratch
        ).best_epoch, monitor.curves
    finally:
        monitor.close()


def validate(backbone: Backbone, samples: tuple[Sample, ...]) -> ClassMetrics:
    """What the network makes of them, by plain means."""
    crops = torch.from_numpy(np.stack([PREPROCESS(sample.read()) for sample in samples])).float()
    images = (crops / 255 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
    with torch.inference_mode():
        logits = backbone.model(images.permute(0, 3, 1, 2))
    return evaluate_classes(logits.numpy(), np.array([sample.label for sample in samples]))


def snapshot(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], backbone: Backbone) -> set[str]:
    return {
        name
        for name, tensor in backbone.model.state_dict().items()
        if not torch.equal(before[name], tensor)
    }


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def _trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Backbone, int, dict[str, list[float]]]:
    backbone = build()
    return backbone, *fit(backbone, draw_splits(), tmp_path_factory.mktemp("trained"), epochs=8)


@pytest.fixture
def trained(
    _trained: tuple[Backbone, int, dict[str, list[float]]],
) -> tuple[Backbone, int, dict[str, list[float]]]:
    """A network after eight epochs from nothing, the best of them, and the curves."""
    return copy.deepcopy(_trained)


def test_training_learns_and_leaves_the_network_at_its_best_epoch(
    trained: tuple[Backbone, int, dict[str, list[float]]],
) -> None:
    backbone, best_epoch, curves = trained
    scores = list(
        zip(curves["epoch/val_accuracy"], [-loss for loss in curves["epoch/val_loss"]], strict=True)
    )
    assert len(scores) == 1 + 8
    assert best_epoch == scores.index(max(scores))
    found = validate(backbone, draw_splits().val)
    assert found.accuracy == max(scores)[0] > 0.6
    # Activations at the boundary are kept in bf16.
    assert found.loss == pytest.approx(-max(scores)[1], rel=1e-2)
    assert not backbone.model.training


@pytest.mark.parametrize("freeze", ["none", "until:stem"])
def test_where_no_epoch_is_better_the_probe_itself_is_kept(
    trained: tuple[Backbone, int, dict[str, list[float]]], tmp_path: Path, freeze: str
) -> None:
    """Training labels are wrong, so that training can only harm."""
    backbone, _, curves = trained
    before, start = snapshot(backbone), probe_of(backbone)
    best_epoch, curves = fit(backbone, draw_splits(shift=1), tmp_path, start, freeze=freeze)
    assert best_epoch == 0
    assert max(curves["epoch/val_accuracy"][1:]) < curves["epoch/val_accuracy"][0]
    assert moved(before, backbone) == set()


def test_training_starts_from_the_probes_head(
    trained: tuple[Backbone, int, dict[str, list[float]]], tmp_path: Path
) -> None:
    backbone, _, before = trained
    start = probe_of(backbone)
    nn.init.zeros_(backbone.head.weight)
    _, curves = fit(backbone, draw_splits(), tmp_path, start, epochs=1, lr=1e-9, backbone_lr=1e-9)
    assert curves["epoch/val_accuracy"] == [max(before["epoch/val_accuracy"])] * 2


@pytest.mark.parametrize("cache", [True, False])
def test_only_what_is_not_frozen_moves(tmp_path: Path, cache: bool) -> None:
    backbone = build()
    before = snapshot(backbone)
    best_epoch, _ = fit(backbone, draw_splits(), tmp_path, freeze="until:stem", cache=cache)
    assert best_epoch > 0
    assert {name for name in before if name.startswith("backbone.stem")}.isdisjoint(
        moved(before, backbone)
    )
    assert moved(before, backbone) >= {
        "backbone.tail.0.weight",
        "backbone.tail.1.bias",
        "head.weight",
        "head.bias",
    }
    assert not any("forward" in vars(module) for module in backbone.model.modules())


@pytest.mark.parametrize("batch_norm", ["keep", "update"])
def test_statistics_of_batch_norm_move_only_where_they_may(tmp_path: Path, batch_norm: str) -> None:
    backbone = build()
    before = snapshot(backbone)
    best_epoch, _ = fit(
        backbone, draw_splits(), tmp_path, freeze="until:stem", batch_norm=batch_norm
    )
    assert best_epoch > 0
    statistics = {
        name
        for name in moved(before, backbone)
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    names = {
        f"backbone.tail.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert statistics == (names if batch_norm == "update" else set())


@pytest.mark.parametrize("cache", [True, False])
def test_a_frozen_module_that_changes_its_own_buffer_fails_the_run(
    tmp_path: Path, cache: bool
) -> None:
    backbone = build(nn.Sequential(Counting(), Trunk()))
    with pytest.raises(
        FrozenDriftError,
        match=r"--freeze until:0: 1 of 1 frozen tensors changed during the run: "
        r"backbone\.0\.num_seen",
    ):
        fit(backbone, draw_splits(), tmp_path, freeze="until:0", cache=cache, epochs=1)


def test_a_broken_loss_raises_with_step_and_rate_and_leaves_the_network_whole(
    tmp_path: Path,
) -> None:
    backbone = build()
    with pytest.raises(
        GraftError,
        match=r"^epoch 1, step [1-9]\d*: the loss is (nan|inf) at a rate of 1\.0e\+30; lower --lr "
        r"and",
    ):
        fit(backbone, draw_splits(), tmp_path, epochs=1, lr=1e30, backbone_lr=1e30)
    assert not any("forward" in vars(module) for module in backbone.model.modules())


def test_rates_warm_up_to_their_peak_and_fall_to_nothing(tmp_path: Path) -> None:
    _, curves = fit(build(), draw_splits(), tmp_path, epochs=5, lr=0.01, backbone_lr=0.001)
    head, trunk = curves["rate/head"], curves["rate/backbone"]
    assert len(head) == 5 * 6
    assert head.index(max(head)) == 3
    assert max(head) == pytest.approx(0.01)
    assert head[:4] == sorted(head[:4])
    assert head[3:] == sorted(head[3:], reverse=True)
    assert 0 < head[-1] < 0.001
    assert trunk == pytest.approx([rate / 10 for rate in head])
    assert curves["rate/head_no_decay"] == head


def test_the_same_seed_gives_the_same_steps_and_another_one_others(tmp_path: Path) -> None:
    losses = [
        fit(build(), draw_splits(), tmp_path, epochs=1, seed=seed)[1]["train/loss"]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_last_batch_of_one_image_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would break BatchNorm in training."""
    splits = draw_splits()
    splits = Splits(LABELS, splits.train[:13], splits.val)
    with caplog.at_level(logging.INFO, "graft"):
        _, curves = fit(build(), splits, tmp_path, freeze="none", epochs=1, batch_norm="update")
    assert len(curves["train/loss"]) == 2
    assert "training 663 parameters in fp32, 0 tensors frozen" in caplog.text
