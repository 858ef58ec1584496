"""Blends of two images with blended labels (`--mix`).

MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) are torchvision's. They draw from torch's
generator, which the training state holds. MixUp is linear, so activations can be blended like
images (manifold mixup, arXiv 1806.05236); CutMix pastes pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2

Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# Of the Beta distributions that shares are drawn from, as in torchvision's recipes: most MixUps are
# nearly one image.
_MIXUP_ALPHA = 0.2
_CUTMIX_ALPHA = 1.0


def build_mix(kind: str, num_classes: int) -> Mix:
    """The function that blends a batch, by the value of `--mix`; with none it changes nothing.

    Images `uint8 [B,H,W,3]` or activations `[B,D]`, and labels `[B]` → the same as `float32`, each
    blended with the one before it, and the shares of the classes `[B,C]`.
    """
    mixup = v2.MixUp(alpha=_MIXUP_ALPHA, num_classes=num_classes)
    cutmix = v2.CutMix(alpha=_CUTMIX_ALPHA, num_classes=num_classes)
    transforms: dict[str, Any] = {
        "mixup": mixup,
        "cutmix": cutmix,
        "both": v2.RandomChoice([mixup, cutmix]),
    }

    def mix(batch: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # torchvision wants [B,3,H,W].
        are_activations = batch.dim() == 2
        images = batch.float()[:, :, None, None] if are_activations else batch.float().movedim(3, 1)
        mixed, shares = transforms[kind](images, labels)
        return (mixed.flatten(1) if are_activations else mixed.movedim(1, 3)), shares

    return (lambda batch, labels: (batch, labels)) if kind == "none" else mix
