"""The values that gradient epochs use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config import Augment
from models.engine.engine import Precision
from models.prepared import Device


@dataclass(frozen=True)
class TrainingSettings:
    """Each has the name of its option in `finetune/config.py`, where its meaning and limits are.

    `first_head` is what the epochs begin from, for people.
    """

    freeze: str
    epochs: int
    batch_size: int
    lr: float
    backbone_lr: float
    weight_decay: float
    layer_decay: float
    batch_norm: Literal["keep", "update"]
    balance: Literal["none", "weights", "sampler"]
    label_smoothing: float
    mix: Literal["none", "mixup", "cutmix", "both"]
    ema: float
    gradual: int
    head_init: str
    first_head: str
    augment: Augment
    views: int
    seed: int
    device: Device
    precision: Precision
    workers: int
    cache: bool
    save_minutes: float
    preflight: bool
    repository: Path
