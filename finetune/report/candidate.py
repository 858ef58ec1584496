"""A model that a run may publish: the probe, or the network whose layers were trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.evaluation.calibration import Calibration, CalibrationQuality
from finetune.evaluation.epoch import EpochMetrics
from finetune.evaluation.metrics import Metrics
from finetune.probe.levels import LevelProbes
from finetune.probe.solve import Head, Probe
from models.engine.engine import EngineInfo, Features
from models.prepared import PreparedBackbone
from models.scores import Floats
from models.sources import SplitName

CandidateName = Literal["probe", "tuned"]


@dataclass(frozen=True)
class Candidate:
    """A model with all that was measured on it.

    `logits` `[N,C]`, `metrics` and `calibrated` are of the splits that no candidate learnt from,
    "val" always among them; `features` `[N,F]` of those at least, of which the head reads the first
    columns. `last_head` is on the last level, as the network itself has it: `head` where that reads
    no others. `freeze` is the policy that holds for its backbone. `solved` is what cross-validation
    said of a probe, `levels` among which levels it chose, `last_metrics` how good the head on the
    last level is on "val"; of a trained network both are None where its own head answers.
    `best_epoch` and `epochs` are those of training, the best one 0 where none was better than the
    head that it began from.
    """

    name: CandidateName
    backbone: PreparedBackbone
    engine: EngineInfo
    freeze: str
    head: Head
    last_head: Head
    logits: Mapping[SplitName, Floats]
    features: Mapping[SplitName, Features]
    metrics: Mapping[SplitName, Metrics]
    calibration: Calibration
    calibrated: Mapping[SplitName, CalibrationQuality]
    seconds: float
    solved: Probe | None = None
    levels: LevelProbes | None = None
    last_metrics: Metrics | None = None
    best_epoch: int | None = None
    epochs: tuple[EpochMetrics, ...] = ()

    @property
    def solution(self) -> Probe:
        """`solved` of the probe."""
        assert self.solved is not None
        return self.solved

    @property
    def columns(self) -> dict[SplitName, Features]:
        """The features that the head reads, `[N,K]`."""
        width = self.head.weight.shape[1]
        return {split: features[:, :width] for split, features in self.features.items()}

    @property
    def last(self) -> Probe:
        """The probe on the last level, which is `solved` where no other levels were tried."""
        return self.solution if self.levels is None else self.levels.last

    @property
    def has_level_head(self) -> bool:
        """Whether `head` reads other levels than the last."""
        return bool(self.head.weight.shape[1] > self.backbone.num_features)

    def metrics_to_dict(self, label_names: tuple[str, ...]) -> dict[str, Any]:
        """Metrics and calibration of each split."""
        return {
            split: {
                **metrics.to_dict(label_names),
                "calibration": self.calibrated[split].to_dict(),
            }
            for split, metrics in self.metrics.items()
        }

    def levels_to_dict(self, metric: str) -> dict[str, Any] | None:
        """Which levels were chosen, and how good the head on the last one is on "val"."""
        if self.levels is None or self.last_metrics is None:
            return None
        last = {metric: self.last_metrics.score, "loss": self.last_metrics.loss}
        return {**self.levels.to_dict(), "last": last}

    def to_dict(self, label_names: tuple[str, ...], metric: str) -> dict[str, Any]:
        """As metrics.json holds each candidate where there are two."""
        return {
            **self.metrics_to_dict(label_names),
            "calibration": self.calibration.to_dict(),
            "engine": self.engine.to_dict(),
            "freeze": self.freeze,
            "best_epoch": self.best_epoch,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "levels": self.levels_to_dict(metric),
            "seconds": self.seconds,
        }
