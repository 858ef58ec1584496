"""Which parameters the optimizer steps, from which epoch on and at which rate."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from finetune.training.settings import TrainingSettings
from models.backbone.build import Backbone
from models.backbone.freezing import Freezing, depths, parameter_groups, set_trainable

logger = logging.getLogger("graft.optimize")

# The share of all steps over which the rates rise to their peak; then they follow a cosine to zero.
_WARMUP_FRACTION = 0.1


def build_optimizer(backbone: Backbone, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW on everything that trains by the last epoch, at the peak rates."""
    groups = parameter_groups(
        backbone.model,
        backbone.classifier,
        head_lr=settings.lr,
        backbone_lr=settings.backbone_lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        prefix=backbone.module_prefix,
    )
    return torch.optim.AdamW(groups, fused=True)


def rate_share(step: int, num_steps: int) -> float:
    """The fraction of the peak rate at a step, from 0 up: linear warm-up, then cosine."""
    num_warmup = max(1, round(num_steps * _WARMUP_FRACTION))
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def open_stages(backbone: Backbone, freezing: Freezing, gradual: int, epoch: int) -> Freezing:
    """Set which stages `--gradual K` trains in an epoch, from 1 up; gives what is frozen then.

    The head, which is solved already, and the last stage train from the first epoch; every K epochs
    the stage before them joins (gradual unfreezing, ULMFiT, arXiv 1801.06146). With 0 everything
    trains from the start.
    """
    if not gradual:
        return freezing
    depth = 1 + (epoch - 1) // gradual
    depth_of = depths(backbone.model, backbone.classifier, backbone.module_prefix)
    waiting = {name for name in depth_of if depth_of[name] > depth}
    now = replace(freezing, frozen_modules=freezing.frozen_modules | waiting)
    set_trainable(backbone.model, now)
    return now


def log_stages(backbone: Backbone, freezing: Freezing, gradual: int, epochs: int) -> None:
    """Log how many stages `--gradual` will train, and how many epochs all of them would need."""
    depth_of = depths(backbone.model, backbone.classifier, backbone.module_prefix)
    num_stages = max(
        depth_of[name]
        for name, module in backbone.model.named_modules()
        if name not in freezing.frozen_modules
        and next(module.parameters(recurse=False), None) is not None
    )
    num_reached = min(num_stages, 1 + (epochs - 1) // gradual)
    enough = 1 + (num_stages - 1) * gradual
    more = f"; --epochs {enough} would reach all of them" if num_reached < num_stages else ""
    logger.log(
        logging.WARNING if more else logging.INFO,
        "--gradual %d: %d of %d stages will have trained in the end%s",
        gradual,
        num_reached,
        num_stages,
        more,
    )
