"""What a run came to: everything that its metrics.json, its checkpoint, its card, its report and its last words are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.auditing.findings import Audit
from finetune.config import Options
from finetune.data.splits import Splits
from finetune.evaluation.calibration import Calibration, CalibrationQuality
from finetune.evaluation.comparison import Comparison
from finetune.evaluation.metrics import Metrics
from finetune.probe.learning_curve import LearningCurve
from finetune.probe.solve import Head
from models.engine.engine import EngineInfo
from models.prepared import PreparedBackbone
from models.scores import Floats
from models.sources import SplitName

# What shapes a probe, and what shapes the gradient epochs besides.
_PROBE_OPTIONS = ("balance", "augment", "views")
_EPOCH_OPTIONS = (
    *("epochs", "batch_size", "lr", "backbone_lr", "weight_decay", "batch_norm"),
    *("label_smoothing", "mix", "ema", "gradual", "layer_decay"),
)


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
    calibrated: Mapping[SplitName, CalibrationQuality]
    probe_metrics: Metrics
    l2: float
    learning_curve: LearningCurve
    val_logits: Floats
    val_features: Floats
    audit: Audit
    best_epoch: int | None
    verdict: Comparison | None
    seconds: dict[str, float]

    @property
    def freeze(self) -> str:
        """The policy of the published model: where the probe won, its backbone is frozen whatever was asked for."""
        return (
            "backbone"
            if self.verdict is not None and self.verdict.publishes == "probe"
            else self.options.freeze
        )

    @property
    def metric(self) -> str:
        """The attribute of metrics that the run is judged by; `metric_name` in words."""
        return self.splits.task.metric

    @property
    def metric_name(self) -> str:
        return self.splits.task.metric_name

    def describe_calibration(self) -> str:
        """One line for people, on val."""
        return self.calibrated["val"].describe()

    def describe_answers(self) -> str:
        """What the service's answers mean: which are unsure, or which labels they name."""
        return self.calibration.describe_answers()

    @property
    def trained_with(self) -> str:
        """The options that shaped the published model and are not at their defaults, as flags."""
        is_probe = self.freeze == "backbone"
        chosen = self.options.model_dump(
            include={*_PROBE_OPTIONS, *(() if is_probe else _EPOCH_OPTIONS)}, exclude_defaults=True
        )
        return (
            " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
            or "the default options"
        )

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        names = self.splits.label_names
        return {
            **{
                split: {**metrics.to_dict(names), "calibration": self.calibrated[split].to_dict()}
                for split, metrics in self.metrics.items()
            },
            "probe": {
                self.metric: self.probe_metrics.score,
                "loss": self.probe_metrics.loss,
                "l2": self.l2,
            },
            "training": None if self.best_epoch is None else {"best_epoch": self.best_epoch},
            "audit": self.audit.to_dict(),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "calibration": self.calibration.to_dict(),
            "learning_curve": self.learning_curve.to_dict(),
            "engine": self.engine.to_dict(),
            "precision": {"chosen": self.engine.precision, "reason": self.why_precision},
            "seconds": self.seconds,
        }
