"""A network, samples and options small enough to train dozens of times in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.candidates import training_settings
from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.monitor import Monitor
from finetune.probe.solve import Probe
from finetune.resume import fix_options
from finetune.training.train import Trained, train
from models.backbone.build import Backbone
from models.backbone.custom import CustomNetwork
from models.preprocess import Preprocess
from models.sources import EncodedImage
from tests.support.images import LABELS as LABELS
from tests.support.images import NOISE_SIZE, draw_noise

SIZE = NOISE_SIZE
PREPROCESS = Preprocess(height=SIZE, width=SIZE)
NUM_FEATURES = 8


class Trunk(nn.Module):
    """Two convolutions, with BatchNorm whose statistics may move, and dropout."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.tail = nn.Sequential(
            nn.Conv2d(6, NUM_FEATURES, 3, stride=2), nn.BatchNorm2d(NUM_FEATURES), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.dropout(self.tail(self.stem(images)).mean(dim=(2, 3)))
        return features


def build_trunk() -> nn.Module:
    """For `--backbone tests.support.tiny:build_trunk`."""
    return Trunk()


def build(build_own: Callable[[], nn.Module] = build_trunk) -> Backbone:
    torch.manual_seed(0)
    model = CustomNetwork(build_own(), NUM_FEATURES)
    model.reset_classifier(len(LABELS))
    return Backbone("own:trunk", model, "head", PREPROCESS, "none", None, "backbone.")


def draw_samples(split: str, count: int, first_seed: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"{split} {label} {seed}", label, EncodedImage(draw_noise(label, seed)))
        for seed in range(first_seed, first_seed + count)
        for label in range(len(LABELS))
    )


def draw_splits(num_train: int = 8) -> Splits:
    return Splits(LABELS, draw_samples("train", num_train, 0), draw_samples("val", 4, 100))


def probe_of(backbone: Backbone) -> Probe:
    """A probe with the weights of the network's own head."""
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
    defaults |= {"precision": "fp32", "augment": "light", "device": "cpu", "batch_norm": "update"}
    return Options(**{**defaults, **changes})


def train_tiny(
    backbone: Backbone,
    splits: Splits,
    start: Probe,
    options: Options,
    monitor: Monitor,
    scratch: Path,
    *,
    state_dir: Path | None = None,
) -> Trained:
    """Train as a run with these options would."""
    return train(
        backbone,
        splits,
        start,
        training_settings(options),
        monitor,
        scratch,
        state_dir=state_dir,
        fixed=fix_options(options.model_dump(mode="json")),
    )


def snapshot(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


class Recorder(Monitor):
    """Keeps the curves; calls `after` with the number of losses so far, one per gradient step."""

    def __init__(self, run_dir: Path, after: Any = None) -> None:
        super().__init__(run_dir)
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._after = after

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        super().scalar(tag, value, step)
        self.curves.setdefault(tag, []).append((step, value))
        if tag == "train/loss" and self._after is not None:
            self._after(len(self.curves[tag]))
