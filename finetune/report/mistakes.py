"""The worst mistakes of a candidate, with pictures of where the network looked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from finetune.data.splits import Sample, Splits
from finetune.report.candidate import Candidate
from finetune.report.plots import Mistake, draw_heat
from models.errors import GraftError, describe_error
from models.images import ImageError, Pixels
from models.preprocess import Preprocess

logger = logging.getLogger("graft.mistakes")

_NUM_MISTAKES = 12


def worst_mistakes(splits: Splits, candidate: Candidate) -> list[Mistake]:
    """The wrong answers of highest score on validation images, the worst first."""
    wrong = splits.task.worst_answers(
        candidate.logits["val"],
        splits.labels(splits.val),
        candidate.calibration,
        splits.label_names,
        _NUM_MISTAKES,
    )
    preprocess = candidate.backbone.preprocess
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
        if (crop := _read_crop(preprocess, splits.val[answer.index])) is not None
    ]


def explain_mistakes(candidate: Candidate, mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The mistakes with their heat maps; as they are, after a warning, if those cannot be had."""
    # Imported here: torch and captum take longer to import than a probe to solve.
    from finetune.training.explain import explain

    crops = [mistake.crop for mistake in mistakes]
    answers = [mistake.label for mistake in mistakes]
    try:
        heats = explain(candidate.backbone, candidate.last_head, crops, answers)
    except GraftError as error:
        logger.warning("no pictures of where the network looked: %s", error)
        return list(mistakes)
    return [
        replace(mistake, heat_map=draw_heat(mistake.crop, heat))
        for mistake, heat in zip(mistakes, heats, strict=True)
    ]


def _read_crop(preprocess: Preprocess, sample: Sample) -> Pixels | None:
    """None if the file can no longer be read; its metrics stay."""
    try:
        return preprocess(sample.read())
    except (ImageError, OSError) as error:
        logger.warning(
            "%s is left out of the pictures of mistakes: %s", sample.key, describe_error(error)
        )
        return None
