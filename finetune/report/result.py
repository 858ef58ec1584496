"""The result of a run, from which its metrics.json, checkpoint, model card and report are made."""

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
from finetune.probe.fit import FitChoice
from finetune.probe.learning_curve import LearningCurve
from finetune.probe.solve import Head
from finetune.report.candidate import Candidate
from models.engine.engine import EngineInfo, Features
from models.prepared import PreparedBackbone
from models.scores import Floats
from models.sources import SplitName

# Options that shape a probe, and those that shape gradient epochs besides.
_PROBE_OPTIONS = ("balance", "augment", "views", "levels", "fit")
_EPOCH_OPTIONS = (
    *("epochs", "batch_size", "lr", "backbone_lr", "weight_decay", "batch_norm"),
    *("label_smoothing", "mix", "ema", "gradual", "layer_decay"),
)


@dataclass(frozen=True)
class Result:
    """A run's candidates, the one `chosen` to be published, and what they have in common.

    `candidates` are the probe and, where layers were trained, the fine-tuned one, which `verdict`
    compares. `replace(result, chosen=other)` describes the other one. `why_precision` is the reason
    for the engine's precision, `fit` what came of --fit auto.
    """

    options: Options
    splits: Splits
    probe: Candidate
    tuned: Candidate | None
    chosen: Candidate
    verdict: Comparison | None
    why_precision: str
    learning_curve: LearningCurve
    audit: Audit
    fit: FitChoice | None
    seconds: Mapping[str, float]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return (self.probe,) if self.tuned is None else (self.probe, self.tuned)

    @property
    def backbone(self) -> PreparedBackbone:
        return self.chosen.backbone

    @property
    def engine(self) -> EngineInfo:
        return self.chosen.engine

    @property
    def freeze(self) -> str:
        return self.chosen.freeze

    @property
    def head(self) -> Head:
        return self.chosen.head

    @property
    def metrics(self) -> Mapping[SplitName, Metrics]:
        return self.chosen.metrics

    @property
    def calibration(self) -> Calibration:
        return self.chosen.calibration

    @property
    def calibrated(self) -> Mapping[SplitName, CalibrationQuality]:
        return self.chosen.calibrated

    @property
    def val_logits(self) -> Floats:
        return self.chosen.logits["val"]

    @property
    def val_features(self) -> Features:
        return self.chosen.columns["val"]

    @property
    def probe_metrics(self) -> Metrics:
        return self.probe.metrics["val"]

    @property
    def l2(self) -> float:
        return self.probe.solution.l2

    @property
    def best_epoch(self) -> int | None:
        return None if self.tuned is None else self.tuned.best_epoch

    @property
    def metric(self) -> str:
        """The attribute of metrics that runs are judged by; people read `metric_name`."""
        return self.splits.task.metric

    @property
    def metric_name(self) -> str:
        return self.splits.task.metric_name

    def describe_calibration(self) -> str:
        """One line for people, on val."""
        return self.calibrated["val"].describe()

    def describe_answers(self) -> str:
        """Which answers of the service are unsure, or which labels they name."""
        return self.calibration.describe_answers()

    @property
    def trained_with(self) -> str:
        """The options that shaped the chosen candidate and are not at their defaults, as flags."""
        epoch_options = () if self.chosen.name == "probe" else _EPOCH_OPTIONS
        changed = self.options.model_dump(
            include={*_PROBE_OPTIONS, *epoch_options}, exclude_defaults=True
        )
        return (
            " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
            or "the default options"
        )

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it: metrics of the chosen candidate, and of both if there are two."""
        names = self.splits.label_names
        return {
            **self.chosen.metrics_to_dict(names),
            "probe": {
                self.metric: self.probe_metrics.score,
                "loss": self.probe_metrics.loss,
                "l2": self.l2,
            },
            "training": None if self.tuned is None else {"best_epoch": self.best_epoch},
            "published": self.chosen.name,
            "candidates": None
            if self.tuned is None
            else {
                candidate.name: candidate.to_dict(names, self.metric)
                for candidate in self.candidates
            },
            "audit": self.audit.to_dict(),
            "levels": self.probe.levels_to_dict(self.metric),
            "fit": {"chosen": self.probe.backbone.fit, "losses": {}}
            if self.fit is None
            else self.fit.to_dict(),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "calibration": self.calibration.to_dict(),
            "learning_curve": self.learning_curve.to_dict(),
            "engine": self.engine.to_dict(),
            "precision": {"chosen": self.engine.precision, "reason": self.why_precision},
            "seconds": dict(self.seconds),
        }
