"""A run's result → the next version of its model in the repository: tensors, engine, golden images, what the service must know."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from finetune.card import write_card
from finetune.result import Result
from finetune.thresholds import LabelCalibration
from models.checkpoint import FORMAT_VERSION, Golden, publish

_NUM_GOLDEN = 4


def choose_golden(result: Result) -> Golden:
    """Validation images spread over the classes, with their logits, for the service to replay."""
    samples = result.splits.val
    chosen = np.unique(np.linspace(0, len(samples) - 1, _NUM_GOLDEN).round().astype(int))
    return Golden(tuple(samples[index].read() for index in chosen), result.val_logits[chosen])


def publish_result(result: Result, golden: Golden, run_dir: Path) -> Path:
    options, backbone, num_classes = result.options, result.backbone, len(result.splits.label_names)
    report = result.to_dict()
    config = {
        **backbone.config,
        "num_classes": num_classes,
        "label_names": list(result.splits.label_names),
        "pretrained_cfg": {**backbone.config["pretrained_cfg"], "num_classes": num_classes},
        "graft": {
            "format_version": FORMAT_VERSION,
            "run": run_dir.name,
            "fingerprint": backbone.fingerprint,
            "freeze": result.freeze,
            "head": backbone.classifier,
            "temperature": result.calibration.temperature,
            **_describe_task(result),
            "preprocess": backbone.preprocess.to_dict(),
            "metrics": {name: report[name] for name in (*result.metrics, "probe")},
            "engine": report["engine"],
            "weights": backbone.weights,
            "is_pretrained": backbone.is_pretrained,
            "license": backbone.license,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "openvino", "pillow", "simplejpeg")},
        },
    }
    head = {f"{backbone.classifier}.weight": result.head.weight, f"{backbone.classifier}.bias": result.head.bias}

    def copy_engine(path: Path) -> None:
        for suffix in (".xml", ".bin"):
            shutil.copyfile(backbone.openvino_path.with_suffix(suffix), path.with_suffix(suffix))

    return publish(
        options.repository,
        options.model_name,
        state={**backbone.read_tensors(), **head},
        config=config,
        golden=golden,
        write_engine=copy_engine,
        card=lambda version: write_card(result, version),
    )


def _describe_task(result: Result) -> dict[str, Any]:
    """What tells the service how to answer."""
    calibration = result.calibration
    if isinstance(calibration, LabelCalibration):
        return {"task": "multi-label", "thresholds": calibration.thresholds.tolist()}
    return {"conformal": {"coverage": calibration.coverage, "threshold": calibration.threshold}}
