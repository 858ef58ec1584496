"""The losses that gradient epochs minimise."""

from __future__ import annotations

import torch
from torch import nn


def image_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy `[B]` of logits `[B,C]` against labels `[B]` or class shares `[B,C]`.

    `class_weights` `[C]` multiply each class's term; `label_smoothing` is the part of every target
    that is spread over all classes (Szegedy et al. 2016, arXiv 1512.00567).
    """
    return nn.functional.cross_entropy(
        logits, targets, class_weights, reduction="none", label_smoothing=label_smoothing
    )


def label_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy `[B]`, the mean over labels, of logits against 0 and 1 `[B,C]`."""
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(
        dim=1
    )
