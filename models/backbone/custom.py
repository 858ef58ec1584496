"""A user's own network, built by the callable that `--backbone package.module:callable` names."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.backbone.weights import load_strictly, read_state_dict
from models.errors import GraftError
from models.named import import_named
from models.preprocess import Preprocess


class CustomNetwork(nn.Module):
    """A user's module, images `[B,3,H,W]` → features `[B,F]`, and a linear head.

    Its methods are named as timm's models name theirs.
    """

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = num_features
        self.head = nn.Linear(num_features, 1)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.backbone(images)
        # A module may compute in bf16 by itself; heads and engines take float32.
        return features if features.dtype == torch.float32 else features.float()

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features and maps `[B,C,H,W]` of stages, where the module has a method of this name."""
        module: Any = self.backbone
        features, stages = module.forward_intermediates(images)
        return features.float(), stages

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(self.num_features, num_classes)


def build_custom(
    name: str, weights: Path | None, image_size: int | None
) -> tuple[CustomNetwork, Preprocess, str]:
    """The network, its preprocess, and where its weights came from as text.

    The module may say how it wants its images in timm's way, by an attribute `pretrained_cfg`.
    Raises GraftError where the user's code fails or gives no features `[B,F]`, WeightsError where
    `weights` do not fit.
    """
    module = call_builder(name)
    # Which may have read pretrained weights, or not.
    source = f"as {name} gives them, pretrained or random"
    if weights is not None:
        load_strictly(module, read_state_dict(weights), f"--weights {weights}", "")
        source = f"file {weights.name}"
    preprocess = _read_preprocess(module, image_size)
    return CustomNetwork(module, _count_features(name, module, preprocess)), preprocess, source


def call_builder(name: str) -> nn.Module:
    """The module that the user's callable returns. Raises GraftError."""
    build = import_named("--backbone", name)
    try:
        module = build()
    # The user's own code can raise anything; the message names the line.
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise GraftError(
            f"--backbone {name}: it raised {type(error).__name__}: {error} "
            f"({place.filename}:{place.lineno})"
        ) from error
    if not isinstance(module, nn.Module):
        raise GraftError(
            f"--backbone {name}: it returned {type(module).__name__}, not an nn.Module"
        )
    return module


def _read_preprocess(module: nn.Module, image_size: int | None) -> Preprocess:
    cfg = getattr(module, "pretrained_cfg", None) or {}
    _, height, width = cfg.get("input_size", (3, 224, 224))
    defaults = Preprocess()
    return Preprocess(
        height=image_size or height,
        width=image_size or width,
        crop_fraction=cfg.get("crop_pct", defaults.crop_fraction),
        interpolation=cfg.get("interpolation", defaults.interpolation),
        mean=tuple(cfg.get("mean", defaults.mean)),
        std=tuple(cfg.get("std", defaults.std)),
    )


def _count_features(name: str, module: nn.Module, preprocess: Preprocess) -> int:
    shape = [2, 3, preprocess.height, preprocess.width]
    module.eval()
    with torch.inference_mode():
        try:
            features = module(torch.zeros(shape))
        # The user's own code can raise anything.
        except Exception as error:
            raise GraftError(f"--backbone {name}: it fails on images {shape}: {error}") from error
    if not isinstance(features, torch.Tensor):
        got = type(features).__name__
    elif not features.is_floating_point():
        got = f"a tensor of {features.dtype}"
    elif features.ndim != 2 or not features.shape[1]:
        got = f"a tensor of shape {list(features.shape)}"
    else:
        return features.shape[1]
    raise GraftError(
        f"--backbone {name}: it must give features [B, F] for images [B, 3, H, W], not {got}"
    )
