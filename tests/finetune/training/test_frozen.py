"""Frozen parameters and buffers stay bit-equal, whatever the policy, network and options."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from finetune.resume import STATE_DIR
from finetune.terminal import Terminated
from models.backbone.build import Backbone
from models.engine.openvino_engine import supports_bf16
from tests.support.tiny import (
    PREPROCESS,
    SIZE,
    Recorder,
    draw_splits,
    options,
    probe_of,
    snapshot,
    train_tiny,
)
from tests.support.tiny import build as build_own

EVERY_OPTION: dict[str, Any] = {
    "balance": "sampler",
    "label_smoothing": 0.1,
    "mix": "mixup",
    "ema": 0.6,
    "gradual": 1,
    "layer_decay": 0.5,
    "augment": "flip",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str) -> Backbone:
    """A network with BatchNorm, one with LayerNorm, or a user's own."""
    if name == "own":
        return build_own()
    torch.manual_seed(0)
    model = timm.create_model(
        name, num_classes=3, **({"img_size": SIZE} if name == "test_vit" else {})
    )
    return Backbone(name, model, model.pretrained_cfg["classifier"], PREPROCESS, "none", None)


def fit(folder: Path, backbone: Backbone, stop_after: int | None, changes: dict[str, Any]) -> int:
    def stop(num_steps: int) -> None:
        if num_steps == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    (folder / STATE_DIR).mkdir(exist_ok=True)
    monitor = Recorder(folder, stop)
    try:
        return train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(**changes),
            monitor,
            folder,
            state_dir=folder / STATE_DIR,
        ).best_epoch
    finally:
        monitor.close()


BF16 = pytest.param(
    "bf16", marks=pytest.mark.skipif(not supports_bf16(), reason="this CPU has no bf16")
)


@pytest.mark.parametrize("precision", ["fp32", BF16])
@pytest.mark.parametrize(
    ("name", "freeze", "trained"),
    [
        ("test_resnet", "backbone", ("fc.",)),
        ("test_resnet", "until:layer2", ("layer3.", "layer4.", "fc.")),
        ("test_vit", "backbone", ("head.",)),
        ("test_vit", "until:blocks.3", ("blocks.4.", "blocks.5.", "norm.", "fc_norm.", "head.")),
        ("own", "backbone", ("head.",)),
        ("own", "until:stem", ("backbone.tail.", "head.")),
    ],
)
def test_frozen_tensors_are_bit_equal_after_a_resumed_training_with_every_option(
    tmp_path: Path, name: str, freeze: str, trained: tuple[str, ...], precision: str
) -> None:
    before = snapshot(build(name))
    # With `resume`, options are not checked against the policy: the command line leaves `--freeze
    # backbone` to the probe.
    changes = {"freeze": freeze, "precision": precision, **EVERY_OPTION, "resume": tmp_path}
    with pytest.raises(Terminated):
        fit(tmp_path, build(name), 5, changes)
    backbone = build(name)
    best_epoch = fit(tmp_path, backbone, None, changes)
    after = snapshot(backbone)
    frozen = [name for name in before if not name.startswith(trained)]
    assert frozen
    assert [name for name in frozen if not torch.equal(before[name], after[name])] == []
    assert best_epoch > 0
    assert any(
        not torch.equal(before[name], after[name]) for name in before if name.startswith(trained)
    )
