"""Shadow versions: asked about the requests of their model too, compared and counted, never sent.

On a backbone that the request runs through anyway a shadow costs its head, and is asked with it. On
another one it costs a pass of its own, which nobody waits for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from models.images import ImageError, Pixels
from service import metrics
from service.errors import RequestError
from service.inference.predictor import Answer, Predictor
from service.inference.repository import Model, Snapshot

# Passes of their own that are under way at once; what comes meanwhile is counted as skipped.
_MAX_PASSES = 16


class Shadows:
    """Asks shadow versions, and counts whether they name the same labels as the answers sent."""

    def __init__(self, predictor: Predictor, deadline_seconds: float) -> None:
        self._predictor = predictor
        self._deadline_seconds = deadline_seconds
        self._passes: set[asyncio.Task[None]] = set()

    def compare(
        self,
        snapshot: Snapshot,
        answers: Sequence[Answer],
        shadow_answers: Sequence[Answer],
        images: Sequence[bytes | Pixels],
    ) -> None:
        """Compare `answers` with their shadows': those given, and those of passes that start here.

        `shadow_answers` are of what `shadows_on_same_backbone` chose.
        """
        given = {answer.model.checkpoint.name: answer for answer in shadow_answers}
        for answer in answers:
            shadow = snapshot.shadow_of(answer.model)
            if shadow is None:
                continue
            if shadow_answer := given.get(answer.model.checkpoint.name):
                _count_agreement(answer, shadow_answer)
            elif len(self._passes) < _MAX_PASSES:
                task = asyncio.create_task(self._ask(shadow, answer, images))
                self._passes.add(task)
                task.add_done_callback(self._passes.discard)
            else:
                _count_skipped(shadow, len(images))

    async def finish(self) -> None:
        """Wait for the passes that are under way."""
        await asyncio.gather(*self._passes)

    async def _ask(self, shadow: Model, answer: Answer, images: Sequence[bytes | Pixels]) -> None:
        deadline = time.monotonic() + self._deadline_seconds
        try:
            (shadow_answer,) = await self._predictor.predict([shadow], images, deadline=deadline)
        except RequestError:
            _count_skipped(shadow, len(images))
        else:
            _count_agreement(answer, shadow_answer)


def shadows_on_same_backbone(snapshot: Snapshot, models: Sequence[Model]) -> list[Model]:
    """The shadows of `models` that run on a backbone of one of `models`."""
    fingerprints = {model.backbone.fingerprint for model in models}
    shadows = (snapshot.shadow_of(model) for model in models)
    return [
        shadow
        for shadow in shadows
        if shadow is not None and shadow.backbone.fingerprint in fingerprints
    ]


def _count_agreement(answer: Answer, shadow_answer: Answer) -> None:
    task, shadow = answer.model.task, shadow_answer.model
    for row, shadow_row in zip(answer.results, shadow_answer.results, strict=True):
        if isinstance(row, ImageError) or isinstance(shadow_row, ImageError):
            continue
        is_same = task.named_labels(row) == shadow.task.named_labels(shadow_row)
        _count(shadow, "agrees" if is_same else "differs")


def _count_skipped(shadow: Model, num_images: int) -> None:
    _count(shadow, "skipped", num_images)


def _count(shadow: Model, outcome: str, num_images: int = 1) -> None:
    labels = (shadow.checkpoint.name, str(shadow.checkpoint.version), outcome)
    metrics.note(metrics.SHADOW, labels, num_images)
