"""The worst mistakes of a run, for its report and TensorBoard: which images, what was said of them, and where the network looked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from finetune.data.splits import Sample
from finetune.report.plots import Mistake, draw_heat
from finetune.report.result import Result
from models.errors import GraftError, describe_error
from models.preprocess import ImageError, Pixels

logger = logging.getLogger("graft.mistakes")

_NUM_MISTAKES = 12


def worst_mistakes(result: Result) -> list[Mistake]:
    """The wrong answers of highest score."""
    splits = result.splits
    wrong = splits.task.worst_answers(
        result.val_logits,
        splits.labels(splits.val),
        result.calibration,
        splits.label_names,
        _NUM_MISTAKES,
    )
    return [
        Mistake(
            crop,
            answer.truth,
            answer.answer,
            answer.score,
            splits.val[answer.index].key,
            label=answer.label,
        )
        for answer in wrong
        if (crop := _read_crop(result, splits.val[answer.index])) is not None
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
