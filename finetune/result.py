"""What a run came to: everything that its metrics.json, its checkpoint, its card and its last words are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.config import Options
from finetune.data import Splits
from finetune.evaluate import Metrics
from finetune.findings import Audit
from finetune.probe import Floats
from models.engine import EngineInfo
from models.prepared import PreparedBackbone


@dataclass(frozen=True)
class Head:
    """The head to publish: weight `[C,F]`, bias `[C]`, and the temperature that its logits are divided by."""

    weight: Floats
    bias: Floats
    temperature: float


@dataclass(frozen=True)
class Result:
    """`metrics` are of the published model by split, "val" always among them; `probe_metrics` of the probe on "val".

    `why_precision` says what spoke for the engine's. `best_epoch` is None for a run without gradient epochs, and 0 where none of them
    was better than the probe.
    """

    options: Options
    splits: Splits
    backbone: PreparedBackbone
    engine: EngineInfo
    why_precision: str
    head: Head
    metrics: dict[str, Metrics]
    probe_metrics: Metrics
    l2: float
    val_logits: Floats
    audit: Audit
    best_epoch: int | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        return {
            **{split: metrics.to_dict(self.splits.label_names) for split, metrics in self.metrics.items()},
            "probe": {"accuracy": self.probe_metrics.accuracy, "loss": self.probe_metrics.loss, "l2": self.l2},
            "training": None if self.best_epoch is None else {"best_epoch": self.best_epoch},
            "audit": self.audit.to_dict(),
            "temperature": self.head.temperature,
            "engine": self.engine.to_dict(),
            "precision": {"chosen": self.engine.precision, "reason": self.why_precision},
            "seconds": self.seconds,
        }
