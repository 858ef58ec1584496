"""The worst mistakes of a run, for its report and TensorBoard: which images, what was said of them, and where the network looked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.data.splits import Sample
from finetune.evaluation.thresholds import LabelCalibration
from finetune.report.plots import Mistake, draw_heat
from finetune.report.result import Result
from models.errors import GraftError, describe_error
from models.preprocess import ImageError, Pixels
from models.scores import sigmoid, softmax

logger = logging.getLogger("graft.mistakes")

_NUM_MISTAKES = 12


def worst_mistakes(result: Result) -> list[Mistake]:
    """The wrong answers of highest score."""
    if isinstance(result.calibration, LabelCalibration):
        return _worst_decisions(result, result.calibration)
    splits, scores = result.splits, softmax(result.val_logits / result.calibration.temperature)
    predicted = scores.argmax(axis=1)
    wrong = [index for index, sample in enumerate(splits.val) if predicted[index] != sample.label]
    worst = sorted(wrong, key=lambda index: -float(scores[index, predicted[index]]))[:_NUM_MISTAKES]
    return [
        Mistake(
            crop,
            splits.label_names[splits.val[index].label],
            splits.label_names[predicted[index]],
            float(scores[index, predicted[index]]),
            splits.val[index].key,
            label=int(predicted[index]),
        )
        for index in worst
        if (crop := _read_crop(result, splits.val[index])) is not None
    ]


def _worst_decisions(result: Result, calibration: LabelCalibration) -> list[Mistake]:
    """Multi-label: of each image the label that it was most wrongly given or denied, the worst ones first."""
    splits, names = result.splits, result.splits.label_names
    scores = sigmoid(result.val_logits / np.float32(calibration.temperature))
    has_label = splits.labels(splits.val) == 1
    wrongness = np.where(
        (scores >= calibration.thresholds) == has_label, 0, np.where(has_label, 1 - scores, scores)
    )
    worst = wrongness.argmax(axis=1)
    order = np.argsort(-wrongness.max(axis=1), kind="stable")[:_NUM_MISTAKES]
    return [
        Mistake(
            crop,
            splits.describe(splits.val[index]) or "no label",
            f"not {names[worst[index]]}" if has_label[index, worst[index]] else names[worst[index]],
            float(wrongness[index, worst[index]]),
            splits.val[index].key,
            label=int(worst[index]),
        )
        for index in order
        if wrongness[index].any() and (crop := _read_crop(result, splits.val[index])) is not None
    ]


def _read_crop(result: Result, sample: Sample) -> Pixels | None:
    """None where a file is no longer there to be read: what was measured on it stays."""
    try:
        return result.backbone.preprocess(sample.read())
    except (ImageError, OSError) as error:
        logger.warning(
            "%s is left out of the pictures of mistakes: %s", sample.key, describe_error(error)
        )
        return None


def explain_mistakes(result: Result, mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The same, each with a picture of where the network looked; without where that cannot be had."""
    # Imported here: torch and captum take longer to import than a probe to solve.
    from finetune.training.explain import explain

    answers = [mistake.label for mistake in mistakes]
    try:
        heats = explain(
            result.backbone, result.head, [mistake.crop for mistake in mistakes], answers
        )
    except GraftError as error:
        logger.warning("no pictures of where the network looked: %s", error)
        return list(mistakes)
    return [
        replace(mistake, looked_at=draw_heat(mistake.crop, heat))
        for mistake, heat in zip(mistakes, heats, strict=True)
    ]
