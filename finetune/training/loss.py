"""How wrong the network is about each image: what gradient epochs make smaller."""

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
    """Cross-entropy `[B]` of logits `[B,C]` against labels `int64 [B]`, or against shares of classes `float [B,C]` where images are mixed.

    `class_weights` `[C]` multiply what each class's share adds; `label_smoothing` spreads this part of every target over all classes
    (Szegedy et al. 2016, arXiv 1512.00567).
    """
    return nn.functional.cross_entropy(
        logits, targets, class_weights, reduction="none", label_smoothing=label_smoothing
    )


def label_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same for multi-label data: the mean over the labels of each one's own cross-entropy, `[B]`, with targets of 0 and 1 `[B,C]`."""
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(
        dim=1
    )
