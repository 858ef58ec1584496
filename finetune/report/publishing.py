"""A run's result → the next version of its model in the repository: tensors, engine, golden images, what the service must know."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finetune.data.cache import digest_image
from finetune.data.splits import Sample
from finetune.report.card import write_card
from finetune.report.result import Result
from finetune.resume import read_id
from models.checkpoint import FORMAT_VERSION, Golden, publish
from models.errors import GraftError

_NUM_GOLDEN = 4


def choose_golden(result: Result, digests: Mapping[str, bytes]) -> Golden:
    """Validation images spread over the classes, with their logits, for the service to replay.

    `digests`, by key, are what the images were when the run began: a file that is another now does not give those logits. Raises
    GraftError where none is what it was.
    """
    samples = result.splits.val
    chosen = np.unique(np.linspace(0, len(samples) - 1, _NUM_GOLDEN).round().astype(int))
    images = {
        index: data
        for index in chosen
        if (data := _read_unchanged(samples[index], digests)) is not None
    }
    if not images:
        keys = ", ".join(samples[index].key for index in chosen)
        raise GraftError(
            f"{keys}: gone or changed since the run began; nothing was published: put them back as they were"
        )
    return Golden(tuple(images.values()), result.val_logits[list(images)])


def _read_unchanged(sample: Sample, digests: Mapping[str, bytes]) -> bytes | None:
    try:
        data = sample.read()
    except OSError:
        return None
    return data if digest_image(data) == digests.get(sample.key) else None


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
            "run_id": read_id(run_dir),
            "fingerprint": backbone.fingerprint,
            "freeze": result.freeze,
            "head": backbone.classifier,
            "temperature": result.calibration.temperature,
            **result.calibration.to_checkpoint(),
            "preprocess": backbone.preprocess.to_dict(),
            "metrics": {name: report[name] for name in (*result.metrics, "probe")},
            "engine": report["engine"],
            "weights": backbone.weights,
            "is_pretrained": backbone.is_pretrained,
            "license": backbone.license,
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "timm", "openvino", "pillow", "simplejpeg")
            },
        },
    }
    head = {
        f"{backbone.classifier}.weight": result.head.weight,
        f"{backbone.classifier}.bias": result.head.bias,
    }

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
