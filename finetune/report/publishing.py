"""A run's result → the next version of its model; the other candidate is kept in the run's folder.

Where layers were trained, `RUN/candidates/` is a repository of its own: its model `probe` or
`tuned`, version 1, is the whole checkpoint of the candidate that was not published, which
finetune/publish.py publishes later.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from finetune.data.cache import digest_image
from finetune.data.splits import Sample
from finetune.report.card import place_card, write_card
from finetune.report.result import Result
from finetune.resume import read_id
from models.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    OPENVINO_FILE,
    WEIGHTS_FILE,
    Golden,
    LevelHead,
    list_versions,
    load_checkpoint,
    publish,
    read_level_head,
)
from models.errors import GraftError, join_first

logger = logging.getLogger("graft.publishing")

CANDIDATES_DIR = "candidates"
_NUM_GOLDEN = 4


def check_labels(repository: Path, name: str, label_names: Sequence[str], new_labels: bool) -> None:
    """Raise GraftError where the newest version of `name` has other labels, unless it is meant.

    A server would swap to the new version, and its clients would get labels that they do not know.
    """
    before = _newest_labels(repository, name)
    if before is None or list(before[1]) == list(label_names):
        return
    version, old = before
    added = [label for label in label_names if label not in old]
    gone = [label for label in old if label not in label_names]
    changes = [
        f"{words} {join_first(labels)}"
        for words, labels in (("new are", added), ("gone are", gone))
        if labels
    ] or ["their order differs"]
    change = f"{repository / name}/{version} has other labels: {', '.join(changes)}"
    if new_labels:
        logger.warning("%s (--new-labels: it is meant)", change)
        return
    raise GraftError(
        f"{change}; a server would swap to them under its clients. If this is another model, say "
        "--name NAME; if its labels are meant to change, say --new-labels"
    )


def _newest_labels(repository: Path, name: str) -> tuple[int, list[str]] | None:
    """The newest version whose labels can be read, and these."""
    for version in reversed(list_versions(repository, name)):
        try:
            config = json.loads((repository / name / str(version) / CONFIG_FILE).read_text())
            return version, [str(label) for label in config["label_names"]]
        # The service refuses such a version, and serves the one before it.
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s/%d: its labels cannot be read: %s", repository / name, version, error
            )
    return None


def keep_other_candidate(result: Result, digests: Mapping[str, bytes], run_dir: Path) -> None:
    """Write the checkpoint of the candidate that was not chosen to `RUN/candidates/<name>/1`.

    Replaces what a stopped process wrote there. Raises GraftError as `publish_chosen` does.
    """
    folder = run_dir / CANDIDATES_DIR
    shutil.rmtree(folder, ignore_errors=True)
    for candidate in result.candidates:
        if candidate is result.chosen:
            continue
        other = replace(result, chosen=candidate)
        kept = _publish(other, digests, run_dir, repository=folder, name=candidate.name)
        num_bytes = sum(path.stat().st_size for path in kept.iterdir())
        logger.info(
            "the %s candidate is kept in %s (%.1f MB); finetune/publish.py %s --which %s "
            "publishes it",
            candidate.name,
            kept,
            num_bytes / 1e6,
            run_dir,
            candidate.name,
        )


def publish_chosen(result: Result, digests: Mapping[str, bytes], run_dir: Path) -> Path:
    """Publish the chosen candidate as the next version of its model; gives the version's folder.

    `digests` are the images' by their keys when the run began. Raises GraftError where no golden
    image is what it was then, where the newest version has other labels and `--new-labels` does not
    say that it is meant, and where the checkpoint cannot be written.
    """
    options = result.options
    # Another run may have published since this one began.
    check_labels(
        options.repository, options.model_name, result.splits.label_names, options.new_labels
    )
    return _publish(
        result, digests, run_dir, repository=options.repository, name=options.model_name
    )


def publish_again(source: Path, repository: Path, name: str, new_labels: bool) -> Path:
    """Publish a checkpoint's folder as the next version of a model; gives the version's folder.

    Raises GraftError where a file of `source` is not what it was, as `check_labels` does, or where
    the new version cannot be written.
    """
    checkpoint = load_checkpoint(source)
    check_labels(repository, name, checkpoint.label_names, new_labels)
    graft = {key: value for key, value in checkpoint.config["graft"].items() if key != "files"}
    card = (source / CARD_FILE).read_text(encoding="utf-8")
    return publish(
        repository,
        name,
        state=load_file(source / WEIGHTS_FILE),
        level_head=read_level_head(source),
        config={**checkpoint.config, "graft": graft},
        golden=checkpoint.golden,
        write_engine=lambda path: _copy_engine(source / OPENVINO_FILE, path),
        card=lambda version: place_card(card, repository, name, version),
    )


def choose_golden(result: Result, digests: Mapping[str, bytes]) -> Golden:
    """Validation images spread over the classes, with their logits, for the service to replay.

    `digests`, by key, are what the images were when the run began: a file that is another now does
    not give those logits. Raises GraftError where none is what it was.
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
            f"{keys}: gone or changed since the run began; nothing was published: put them back "
            "as they were"
        )
    return Golden(tuple(images.values()), result.val_logits[list(images)])


def _read_unchanged(sample: Sample, digests: Mapping[str, bytes]) -> bytes | None:
    try:
        data = sample.read()
    except OSError:
        return None
    return data if digest_image(data) == digests.get(sample.key) else None


def _publish(
    result: Result, digests: Mapping[str, bytes], run_dir: Path, *, repository: Path, name: str
) -> Path:
    backbone, num_classes = result.backbone, len(result.splits.label_names)
    golden = choose_golden(result, digests)
    report = result.to_dict()
    config = {
        **backbone.config,
        "num_classes": num_classes,
        "label_names": list(result.splits.label_names),
        "pretrained_cfg": {**backbone.config["pretrained_cfg"], "num_classes": num_classes},
        "graft": {
            "format_version": 2 if result.chosen.has_level_head else 1,
            "run": run_dir.name,
            "run_id": read_id(run_dir),
            "candidate": result.chosen.name,
            "fingerprint": backbone.fingerprint,
            "freeze": result.freeze,
            "head": backbone.classifier,
            "temperature": result.calibration.temperature,
            **result.calibration.to_checkpoint(),
            "preprocess": backbone.preprocess.to_dict(),
            "metrics": {split: report[split] for split in (*result.metrics, "probe")},
            "engine": report["engine"],
            "weights": backbone.weights,
            "is_pretrained": backbone.is_pretrained,
            "license": backbone.license,
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("torch", "timm", "openvino", "pillow", "simplejpeg")
            },
        },
    }
    last = result.chosen.last_head
    head = {
        f"{backbone.classifier}.weight": last.weight,
        f"{backbone.classifier}.bias": last.bias,
    }
    level_head = None
    if result.chosen.has_level_head:
        level_head = LevelHead(result.head.weight, result.head.bias)
    return publish(
        repository,
        name,
        state={**backbone.read_tensors(), **head},
        level_head=level_head,
        config=config,
        golden=golden,
        write_engine=lambda path: _copy_engine(backbone.openvino_path, path),
        card=lambda version: place_card(
            write_card(result, version, run_dir), repository, name, version
        ),
    )


def _copy_engine(source: Path, path: Path) -> None:
    for suffix in (".xml", ".bin"):
        shutil.copyfile(source.with_suffix(suffix), path.with_suffix(suffix))
