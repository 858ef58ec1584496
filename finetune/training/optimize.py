"""What the optimizer steps: from which epoch on, and at which rate."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from finetune.config import Options
from models.backbone.build import Backbone
from models.backbone.freezing import Freezing, depths, parameter_groups, set_trainable

logger = logging.getLogger("graft.optimize")

# The share of all steps over which the rates rise to their peak; from there they follow a cosine to zero.
_WARMUP_FRACTION = 0.1


def build_groups(backbone: Backbone, options: Options) -> list[dict[str, object]]:
    """What trains in the end, with its peak rates, for an optimizer."""
    return parameter_groups(
        backbone.model,
        backbone.classifier,
        head_lr=options.lr,
        backbone_lr=options.backbone_lr,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        prefix=backbone.module_prefix,
    )


def rate_share(step: int, num_steps: int) -> float:
    """The share of the peak rate at a step: linear warm-up, then cosine."""
    num_warmup = max(1, round(num_steps * _WARMUP_FRACTION))
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def open_stages(backbone: Backbone, freezing: Freezing, options: Options, epoch: int) -> Freezing:
    """Let train what `--gradual K` lets train in an epoch, from 1 up, and give what is frozen then (ULMFiT, arXiv 1801.06146).

    The head and the last stage begin, for the head has been solved already; every K epochs one stage more joins them.
    """
    if not options.gradual:
        return freezing
    depth = 1 + (epoch - 1) // options.gradual
    depth_of = depths(backbone.model, backbone.classifier, backbone.module_prefix)
    waiting = {name for name in depth_of if depth_of[name] > depth}
    now = replace(freezing, frozen_modules=freezing.frozen_modules | waiting)
    set_trainable(backbone.model, now)
    return now


def say_stages(backbone: Backbone, freezing: Freezing, options: Options) -> None:
    """Say how `--gradual` will go, and what it leaves for a longer run."""
    depth_of = depths(backbone.model, backbone.classifier, backbone.module_prefix)
    num_stages = max(
        depth_of[name]
        for name, module in backbone.model.named_modules()
        if name not in freezing.frozen_modules
        and next(module.parameters(recurse=False), None) is not None
    )
    num_reached = min(num_stages, 1 + (options.epochs - 1) // options.gradual)
    enough = 1 + (num_stages - 1) * options.gradual
    say = logger.warning if num_reached < num_stages else logger.info
    more = f"; --epochs {enough} would reach all of them" if num_reached < num_stages else ""
    say(
        "--gradual %d: %d of %d stages will have trained in the end%s",
        options.gradual,
        num_reached,
        num_stages,
        more,
    )
