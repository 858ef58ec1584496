"""Results of runs whose features were drawn, for reports and cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune.auditing.findings import Audit
from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.evaluation.comparison import Comparison
from finetune.evaluation.epoch import EpochMetrics
from finetune.probe.learning_curve import measure_learning_curve
from finetune.probe.solve import Head, solve_probe
from finetune.report.candidate import Candidate, CandidateName
from finetune.report.result import Result
from finetune.tasks.single_label import SINGLE_LABEL
from finetune.tasks.task import Task
from models.engine.engine import EngineInfo
from models.preprocess import Preprocess
from models.scores import Floats, Labels
from models.sources import EncodedImage, SplitName

NUM_FEATURES = 20
LABEL_NAMES = ("<b>cat</b>", "dog & hound", "a|b \"'Ünï")
ENGINE = EngineInfo("OpenVINO", "cpu", "bf16", 8, 2, 300.0)
# The three epochs of every tuned candidate, the best one last.
EPOCHS = (
    EpochMetrics(0, None, 0.9, 0.7),
    EpochMetrics(1, 0.8, 0.7, 0.75),
    EpochMetrics(2, 0.5, 0.6, 0.82),
    EpochMetrics(3, 0.3, 0.62, 0.85),
)


@dataclass(frozen=True)
class _Drawn:
    splits: Splits
    train: Floats
    val: Floats

    @property
    def labels(self) -> dict[SplitName, Labels]:
        return {name: self.splits.labels(samples) for name, samples in self.splits.named()}


def make_result(
    num_classes: int = 3,
    *,
    is_trained: bool = False,
    publish: CandidateName = "probe",
    task: Task = SINGLE_LABEL,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Of 60 training and 40 validation images a class; `is_trained` adds a tuned candidate."""
    drawn = _draw(num_classes, task)
    labels = drawn.labels
    solved = solve_probe(drawn.train, labels["train"], num_classes, task=task, seed=0)
    head = Head(solved.weight, solved.bias)
    logits = solved.logits(drawn.val)
    calibrated = task.calibrate_probe(
        solved.out_of_fold_logits,
        solved.temperature,
        labels["train"],
        {"val": logits},
        labels,
        0.9,
    )
    probe = _make_candidate(drawn, "probe", head, logits, calibrated, solved=solved, seconds=1.5)
    tuned, verdict = None, None
    if is_trained:
        better = np.asarray((logits + _sure_logits(labels["val"], num_classes)) / 2, np.float32)
        calibrated = task.calibrate_trained({"val": better}, labels, 0.9, 0)
        tuned = _make_candidate(
            drawn,
            "tuned",
            head,
            better,
            calibrated,
            freeze="until:layer3",
            best_epoch=3,
            epochs=EPOCHS,
            seconds=60.0,
        )
        scores = task.compare(logits, better, labels["val"])
        verdict = Comparison(scores, 1.5, 60.0, asked=publish)
    return Result(
        options=Options(
            data="photos/",
            name="pets",
            freeze="until:layer3" if is_trained else "backbone",
            coverage=0.9,
            **(options or {}),
        ),
        splits=drawn.splits,
        probe=probe,
        tuned=tuned,
        chosen=probe if tuned is None or publish == "probe" else tuned,
        verdict=verdict,
        why_precision="int8 would not pay",
        learning_curve=measure_learning_curve(
            drawn.train, labels["train"], solved, drawn.val, labels["val"], task, seed=0
        ),
        audit=Audit((), {"val": (0.9, 0.9)}, 100 * num_classes),
        fit=None,
        seconds={"probe": 1.5, "total": 4.6},
    )


def _sure_logits(labels: Labels, num_classes: int) -> Floats:
    """Logits `[N,C]` that are right and sure."""
    is_label = np.eye(num_classes)[labels] if labels.ndim == 1 else labels
    return (8 * is_label - 4).astype(np.float32)


def _draw(num_classes: int, task: Task) -> _Drawn:
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 2, (num_classes, NUM_FEATURES))

    def draw(count: int) -> tuple[Floats, list[Any]]:
        classes = np.arange(count) % num_classes
        features = centres[classes] + generator.normal(0, 3, (count, NUM_FEATURES))
        if task is SINGLE_LABEL:
            return features.astype(np.float32), [int(label) for label in classes]
        # The class, and for every fourth image the next one, too.
        named = [
            tuple(sorted({int(label), *([int(label + 1) % num_classes] if index % 4 == 0 else [])}))
            for index, label in enumerate(classes)
        ]
        return features.astype(np.float32), named

    (train, train_labels), (val, val_labels) = draw(60 * num_classes), draw(40 * num_classes)
    names = (*LABEL_NAMES, *(f"class {index}" for index in range(3, num_classes)))[:num_classes]
    splits = Splits(
        names,
        _samples(train_labels),
        _samples(val_labels),
        task=task,
    )
    return _Drawn(splits, train, val)


def _samples(labels: list[Any]) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"photos/{index}.jpg", label, EncodedImage(b""))
        for index, label in enumerate(labels)
    )


def _make_candidate(
    drawn: _Drawn,
    name: CandidateName,
    head: Head,
    logits: Floats,
    calibrated: tuple[Any, Mapping[Any, Any]],
    *,
    freeze: str = "backbone",
    **measured: Any,
) -> Candidate:
    calibration, qualities = calibrated
    labels = drawn.labels["val"]
    metrics = drawn.splits.task.evaluate(logits, labels, qualities["val"].answers)
    backbone: Any = SimpleNamespace(
        name="resnet18",
        weights="a package",
        license="apache-2.0",
        is_pretrained=True,
        preprocess=Preprocess(height=224, width=224),
        fit="crop",
    )
    return Candidate(
        name=name,
        backbone=backbone,
        engine=ENGINE,
        freeze=freeze,
        head=head,
        last_head=head,
        logits={"val": logits},
        features={"train": drawn.train, "val": drawn.val},
        metrics={"val": metrics},
        calibration=calibration,
        calibrated=qualities,
        **measured,
    )
