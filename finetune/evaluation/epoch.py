"""What one epoch of gradient steps came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochMetrics:
    """Losses and the task's first metric of one epoch; epoch 0 is the head that training began
    from, without `train_loss`.
    """

    epoch: int
    train_loss: float | None
    val_loss: float
    val_score: float
