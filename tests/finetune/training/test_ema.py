"""The moving average is the formula's, is validated and kept, and does not change training."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from finetune.command_line import parse_options
from finetune.config import Options
from finetune.evaluation.class_metrics import evaluate_classes
from finetune.resume import STATE_DIR
from finetune.terminal import Terminated
from finetune.training.ema import Ema
from models.backbone.build import Backbone
from models.errors import GraftError
from tests.support.tiny import (
    PREPROCESS,
    Recorder,
    Trunk,
    build,
    draw_splits,
    options,
    probe_of,
    snapshot,
    train_tiny,
)

Tensors = dict[str, torch.Tensor]
DECAY = 0.6


pytestmark = pytest.mark.usefixtures("one_thread")


def fit(
    folder: Path, backbone: Backbone | None = None, **changes: Any
) -> tuple[int, Backbone, list[Tensors], Recorder]:
    """The best epoch, the network, its own tensors after each step, and the monitor."""
    backbone = backbone or build()
    steps = [snapshot(backbone)]
    (folder / STATE_DIR).mkdir(parents=True, exist_ok=True)
    monitor = Recorder(folder, lambda num_steps: steps.append(snapshot(backbone)))
    try:
        given = options(**{"freeze": "until:stem", "cache": False, **changes})
        trained = train_tiny(
            backbone,
            draw_splits(),
            probe_of(build()),
            given,
            monitor,
            folder,
            state_dir=folder / STATE_DIR,
        )
    finally:
        monitor.close()
    return trained.best_epoch, backbone, steps, monitor


def average_by_hand(steps: list[Tensors]) -> Tensors:
    average = {name: tensor.double() for name, tensor in steps[0].items()}
    for number, step in enumerate(steps[1:], 1):
        decay = min(DECAY, (1 + number) / (10 + number))
        for name, tensor in step.items():
            average[name] = (
                decay * average[name] + (1 - decay) * tensor.double()
                if tensor.is_floating_point()
                else tensor.double()
            )
    return average


def test_the_average_is_the_formulas_and_whole_numbers_are_the_last() -> None:
    current = {"weight": torch.tensor([1.0, 2.0]), "num_batches": torch.tensor(0)}
    average = Ema(current, 0.9)
    steps = [copy.deepcopy(current)]
    for step in range(1, 200):
        current["weight"] += step
        current["num_batches"] += 1
        steps.append(copy.deepcopy(current))
        average.update(step)
    expected = steps[0]["weight"].double()
    for number, tensors in enumerate(steps[1:], 1):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * tensors["weight"].double()
    torch.testing.assert_close(average.tensors["weight"].double(), expected, rtol=1e-5, atol=0)
    assert int(average.tensors["num_batches"]) == 199
    assert torch.equal(current["weight"], steps[-1]["weight"])


def test_the_network_is_the_average_only_within() -> None:
    current = {"weight": torch.tensor([1.0])}
    average = Ema(current, 0.5)
    current["weight"] += 1
    with average.in_place():
        assert current["weight"].item() == 1
    with pytest.raises(IndexError), average.in_place():
        _ = current["weight"][5]
    assert current["weight"].item() == 2
    assert average.tensors["weight"].item() == 1


def validate(tensors: Tensors) -> float:
    """The validation loss of a network with these tensors, by plain means."""
    backbone = build()
    backbone.model.load_state_dict(
        {
            name: tensor.to(backbone.model.state_dict()[name].dtype)
            for name, tensor in tensors.items()
        }
    )
    backbone.model.eval()
    samples = draw_splits().val
    crops = torch.from_numpy(np.stack([PREPROCESS(sample.read()) for sample in samples])).float()
    images = (crops / 255 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
    with torch.no_grad():
        logits = backbone.model(images.permute(0, 3, 1, 2))
    return evaluate_classes(logits.numpy(), np.array([sample.label for sample in samples])).loss


def test_the_average_is_validated_and_kept_and_the_steps_are_those_without_it(
    tmp_path: Path,
) -> None:
    best_epoch, backbone, steps, monitor = fit(tmp_path / "averaged", ema=DECAY, epochs=3)
    assert best_epoch > 0
    ends = [average_by_hand(steps[: 1 + 4 * epoch]) for epoch in range(4)]
    found = [loss for _, loss in monitor.curves["epoch/val_loss"]]
    assert found == pytest.approx([validate(end) for end in ends], rel=1e-4)
    for name, tensor in snapshot(backbone).items():
        torch.testing.assert_close(
            tensor.double(), ends[best_epoch][name], rtol=1e-4, atol=1e-6, msg=name
        )
    assert any(
        not torch.equal(tensor, steps[4 * best_epoch][name])
        for name, tensor in snapshot(backbone).items()
    )
    _, _, plain_steps, _ = fit(tmp_path / "plain", epochs=3)
    for averaged, plain in zip(steps, plain_steps, strict=True):
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in plain.items())


def test_frozen_tensors_are_bit_equal_and_statistics_are_averaged_where_they_move(
    tmp_path: Path,
) -> None:
    before = snapshot(build())
    for batch_norm in ("keep", "update"):
        best_epoch, backbone, steps, _ = fit(
            tmp_path / batch_norm, ema=DECAY, batch_norm=batch_norm
        )
        assert best_epoch > 0
        after = snapshot(backbone)
        assert all(
            torch.equal(tensor, after[name])
            for name, tensor in before.items()
            if name.startswith("backbone.stem")
        )
        mean = "backbone.tail.1.running_mean"
        assert torch.equal(after[mean], before[mean]) == (batch_norm == "keep")
        assert torch.equal(after[mean], steps[4 * best_epoch][mean]) == (batch_norm == "keep")


class Stopping(nn.Module):
    """It asks for an end in the midst of a validation, the one after the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        own = Trunk()
        self.stem, self.tail, self.dropout = own.stem, own.tail, own.dropout
        self.num_validated = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            self.num_validated += 1
            if self.num_validated == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        features: torch.Tensor = self.dropout(self.tail(self.stem(images)).mean(dim=(2, 3)))
        return features


def test_a_stop_while_the_average_is_validated_saves_the_network_itself(tmp_path: Path) -> None:
    _, expected, _, _ = fit(tmp_path / "undisturbed", ema=DECAY, epochs=3)
    with pytest.raises(Terminated):
        fit(tmp_path / "stopped", build(Stopping), ema=DECAY, epochs=3)
    _, found, _, _ = fit(tmp_path / "stopped", ema=DECAY, epochs=3)
    assert all(
        torch.equal(tensor, snapshot(found)[name]) for name, tensor in snapshot(expected).items()
    )


@pytest.mark.parametrize(
    "arguments", ["--ema 1 --freeze none", "--ema -0.1 --freeze none", "--ema 0.99"]
)
def test_a_decay_that_cannot_be_is_refused(arguments: str) -> None:
    with pytest.raises(
        GraftError,
        match=r"^--ema \S+: it (must be a number from 0 and below 1$|is for gradient epochs, and "
        r"--freeze back)",
    ):
        parse_options(Options, arguments.split())
