"""What a run came to: everything that its metrics.json, its checkpoint, its card, its report and its last words are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.calibration import Calibrated, Calibration
from finetune.config import Options
from finetune.data import SplitName, Splits
from finetune.evaluate import Metrics
from finetune.findings import Audit
from finetune.learning_curve import LearningCurve
from finetune.probe import Floats
from finetune.verdict import Verdict
from models.engine import EngineInfo
from models.prepared import PreparedBackbone


@dataclass(frozen=True)
class Head:
    """The head to publish: weight `[C,F]` and bias `[C]`."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class Result:
    """`metrics` and `calibrated` are of the published model by split, "val" always among them; `probe_metrics` of the probe on "val".

    `why_precision` says what spoke for the engine's. `best_epoch` and `verdict` are None for a run without gradient epochs; the epoch
    is 0 where none of them was better than the probe. `val_logits` `[N,C]` and `val_features` `[N,F]` are the published model's.
    """

    options: Options
    splits: Splits
    backbone: PreparedBackbone
    engine: EngineInfo
    why_precision: str
    head: Head
    metrics: dict[SplitName, Metrics]
    calibration: Calibration
    calibrated: dict[SplitName, Calibrated]
    probe_metrics: Metrics
    l2: float
    learning_curve: LearningCurve
    val_logits: Floats
    val_features: Floats
    audit: Audit
    best_epoch: int | None
    verdict: Verdict | None
    seconds: dict[str, float]

    @property
    def freeze(self) -> str:
        """The policy of the published model: where the probe won, its backbone is frozen whatever was asked for."""
        return "backbone" if self.verdict is not None and self.verdict.publishes == "probe" else self.options.freeze

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        names = self.splits.label_names
        return {
            **{
                split: {**metrics.to_dict(names), "calibration": self.calibrated[split].to_dict()}
                for split, metrics in self.metrics.items()
            },
            "probe": {"accuracy": self.probe_metrics.accuracy, "loss": self.probe_metrics.loss, "l2": self.l2},
            "training": None if self.best_epoch is None else {"best_epoch": self.best_epoch},
            "audit": self.audit.to_dict(),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "calibration": self.calibration.to_dict(),
            "learning_curve": self.learning_curve.to_dict(),
            "engine": self.engine.to_dict(),
            "precision": {"chosen": self.engine.precision, "reason": self.why_precision},
            "seconds": self.seconds,
        }
