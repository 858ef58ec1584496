"""Encoded images → scores, without HTTP: through the queue of each backbone, then every head."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from opentelemetry import trace

from models.checkpoint import logits
from models.engine.engine import Features
from models.images import ImageError, Pixels
from service import metrics
from service.engine.batcher import Admission, deadline_exceeded
from service.inference.repository import Backbone, Model
from service.tasks.task import Scores

# The features of one image, by the fingerprint of the backbone.
FeaturesByBackbone = dict[str, Features]


@dataclass(frozen=True)
class Answer:
    """One model's probabilities `[C]` of each image in order, or why the image is unreadable."""

    model: Model
    results: tuple[Scores | ImageError, ...]


class Predictor:
    """Answers requests on models whose backbones it is given; owns the feature cache."""

    def __init__(self, *, cached_images: int = 0, is_traced: bool = False) -> None:
        self._is_traced = is_traced
        self._cache = FeatureCache(cached_images) if cached_images else None

    async def predict(
        self, models: Sequence[Model], images: Sequence[bytes | Pixels], *, deadline: float
    ) -> list[Answer]:
        """One answer per model: each image is decoded once and runs once through each backbone.

        An image is an encoded file or a crop. One that cannot be read fails alone, as the
        ImageError in its place. Raises RequestError where a queue is full, or at the time of
        `deadline` (on `time.monotonic()`).
        """
        backbones = {model.backbone.fingerprint: model.backbone for model in models}
        names = [model.checkpoint.name for model in models]
        with (
            ExitStack() as stack,
            self._span("predict", {"graft.models": names, "graft.images": len(images)}),
        ):
            # Before anything is awaited: a backbone must not be closed between the choice of a
            # model and the admission to its queue.
            admissions = {
                name: stack.enter_context(one.batcher.admit(len(images), deadline))
                for name, one in backbones.items()
            }
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    features = await self._features(backbones, admissions, images)
            except TimeoutError:
                raise deadline_exceeded() from None
        return [_answer(model, features) for model in models]

    async def _features(
        self,
        backbones: Mapping[str, Backbone],
        admissions: Mapping[str, Admission],
        images: Sequence[bytes | Pixels],
    ) -> list[FeaturesByBackbone | ImageError]:
        """Features of each image; no more images are under way than keep the engines busy."""
        if len(images) == 1:
            return [await self._features_of_one(backbones, admissions, images[0])]
        results: list[FeaturesByBackbone | ImageError] = [ImageError("not decoded")] * len(images)
        pending = iter(enumerate(images))

        async def work() -> None:
            for index, image in pending:
                results[index] = await self._features_of_one(backbones, admissions, image)

        engines = [backbone.engine for backbone in backbones.values()]
        num_workers = min(
            len(images), 2 * max(engine.num_slots * engine.info.batch_size for engine in engines)
        )
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_workers):
                    group.create_task(work())
        # The first failure cancels the rest and is the request's answer.
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return results

    async def _features_of_one(
        self,
        backbones: Mapping[str, Backbone],
        admissions: Mapping[str, Admission],
        image: bytes | Pixels,
    ) -> FeaturesByBackbone | ImageError:
        key = b""
        if self._cache is not None and isinstance(image, bytes):
            key = hashlib.blake2b(image, digest_size=16).digest()
            if found := self._cache.find(backbones, key):
                return found
        try:
            # One after the other: an image waits in one queue at a time.
            found = {
                name: await self._features_by(backbone, admissions[name], image)
                for name, backbone in backbones.items()
            }
        except ImageError as error:
            return error
        if key and self._cache is not None:
            self._cache.add(key, found)
        return found

    async def _features_by(
        self, backbone: Backbone, admission: Admission, image: bytes | Pixels
    ) -> Features:
        if not isinstance(image, bytes):
            wanted = (backbone.preprocess.height, backbone.preprocess.width, 3)
            if image.shape != wanted:
                raise ImageError(
                    f"pixels are of shape {list(image.shape)}, this model takes {list(wanted)}"
                )
        with self._span("features", {"graft.backbone": backbone.fingerprint[:12]}):
            return await admission.features(image)

    def _span(self, name: str, attributes: Mapping[str, Any]) -> AbstractContextManager[object]:
        # Without an exporter a span still costs 50 µs.
        return (
            trace.get_tracer("graft").start_as_current_span(name, attributes=attributes)
            if self._is_traced
            else nullcontext()
        )


class FeatureCache:
    """Features of the latest images, by a hash of their bytes: a repeated one is not run again."""

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._entries: OrderedDict[tuple[str, bytes], Features] = OrderedDict()

    def find(self, fingerprints: Mapping[str, object], key: bytes) -> FeaturesByBackbone | None:
        """The features from each of these backbones, or None where one is missing."""
        found = {name: self._entries.get((name, key)) for name in fingerprints}
        is_complete = all(features is not None for features in found.values())
        metrics.note(metrics.CACHED_FEATURES, ("yes" if is_complete else "no",))
        if not is_complete:
            return None
        for name in found:
            self._entries.move_to_end((name, key))
        return {name: features for name, features in found.items() if features is not None}

    def add(self, key: bytes, features: FeaturesByBackbone) -> None:
        for name, row in features.items():
            # A row of a batch would keep the whole batch alive.
            self._entries[name, key] = row.copy()
            self._entries.move_to_end((name, key))
        while len(self._entries) > self._max_images:
            self._entries.popitem(last=False)


def _answer(model: Model, features: Sequence[FeaturesByBackbone | ImageError]) -> Answer:
    fingerprint = model.backbone.fingerprint
    readable = [one[fingerprint] for one in features if not isinstance(one, ImageError)]
    rows: Iterator[Scores] = iter(())
    if readable:
        # A copy only where there is something to join.
        rows = iter(scores(model, readable[0][None] if len(readable) == 1 else np.stack(readable)))
    return Answer(
        model, tuple(one if isinstance(one, ImageError) else next(rows) for one in features)
    )


def scores(model: Model, features: Features) -> Scores:
    """Features `[B,F]` → calibrated probabilities `[B,C]`."""
    return model.task.scores(logits(model.checkpoint, features))
