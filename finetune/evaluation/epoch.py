"""What one epoch of gradient steps came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochMetrics:
    """Losses and score of one epoch; epoch 0 is the first head, which has no `train_loss`."""

    epoch: int
    train_loss: float | None
    val_loss: float
    val_score: float
