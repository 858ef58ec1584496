"""Train what is not frozen, starting from a solved head (LP-FT, arXiv 2202.10054)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from finetune.data.splits import Splits
from finetune.evaluation.epoch import EpochMetrics
from finetune.monitor import Monitor
from finetune.probe.solve import Probe
from finetune.resume import TRAINING_FILE
from finetune.terminal import stop_softly
from finetune.training.broken_batch import BrokenLossError
from finetune.training.head import start_head
from finetune.training.inputs import open_inputs
from finetune.training.loop import Training
from finetune.training.settings import TrainingSettings
from models.backbone.build import Backbone
from models.backbone.freezing import FrozenDriftError, freeze, prove_frozen
from models.engine.openvino_engine import supports_bf16
from models.prepared import resolve_device

logger = logging.getLogger("graft.train")


@dataclass(frozen=True)
class Trained:
    """The epoch whose weights were kept, 0 for the first head's, and the metrics of all epochs."""

    best_epoch: int
    epochs: tuple[EpochMetrics, ...]


def train(
    backbone: Backbone,
    splits: Splits,
    start: Probe,
    settings: TrainingSettings,
    monitor: Monitor,
    scratch: Path,
    *,
    state_dir: Path | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Trained:
    """Train `backbone.model` in place, and leave it at the epoch that validates best.

    Epoch 0 is the head of `start` on the pretrained network. Activations at the freeze boundary are
    kept in `state_dir`, with a state from which another call goes on where this one was stopped, if
    everything `fixed` is still the same; without `state_dir` activations are in `scratch`, and no
    state is kept. Raises BrokenLossError where the loss is NaN or infinite, FrozenDriftError where
    something frozen changed, GraftError where a single image needs too much memory, and, once the
    state is saved, KeyboardInterrupt on Ctrl-C and SIGTERM.
    """
    device = resolve_device(settings.device)
    precision = _training_precision(settings.precision, device)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device, devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true"
    )
    fabric.seed_everything(settings.seed, verbose=False)
    start_head(backbone, start, settings.head_init)
    freezing = freeze(backbone.model, settings.freeze, backbone.classifier, backbone.module_prefix)
    state_path = None if state_dir is None else state_dir / TRAINING_FILE
    try:
        opened = open_inputs(
            backbone, freezing, splits, settings, state_dir or scratch, fabric.device
        )
        with contextlib.closing(opened) as inputs, stop_softly() as stop_asked:
            training = Training(
                backbone,
                freezing,
                splits,
                inputs,
                settings,
                monitor,
                fabric,
                precision,
                state_path,
                fixed or {},
                stop_asked,
            )
            training.run()
        progress = training.progress
        if progress.best_epoch == 0:
            logger.info("no epoch validated better than %s, which is kept", settings.first_head)
        training.state.restore_best()
        backbone.model.eval()
        prove_frozen(backbone.model, freezing)
    except (BrokenLossError, FrozenDriftError):
        if state_path is not None:
            state_path.unlink(missing_ok=True)  # resumed, it would fail in the same way
        raise
    return Trained(progress.best_epoch, tuple(progress.epochs))


def _training_precision(asked: str, device: str) -> str:
    """With auto, bf16 where the hardware has it: twice as fast on such a CPU."""
    if asked in ("fp32", "bf16"):
        return asked
    return "bf16" if device == "cuda" or supports_bf16() else "fp32"
