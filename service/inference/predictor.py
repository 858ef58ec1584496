"""Encoded images → scores, without HTTP: the queue of each backbone, every head, calibrated scores."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from opentelemetry import trace

from models.checkpoint import Checkpoint, logits
from models.engine.engine import Features
from models.preprocess import ImageError, Pixels
from models.scores import sigmoid
from service import metrics
from service.engine.batcher import Ticket, deadline_exceeded
from service.inference.repository import Backbone, Model

Scores = npt.NDArray[np.float32]
# By fingerprint, the features that each backbone gives for one image.
FeaturesByBackbone = dict[str, Features]


@dataclass(frozen=True)
class Answer:
    """What one model says: calibrated probabilities `[C]` for each image in order, or why that image could not be read.

    Those of a multi-label model are each label's own, and do not add up to one.
    """

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
        """One answer per model: each image is decoded once, and runs once through each backbone. An image is an encoded file or
        the crop itself, and one that cannot be read fails alone, as the ImageError in its place.

        Raises RequestError where a queue is full, or the time of `deadline` (on `time.monotonic()`) has come.
        """
        backbones = {model.backbone.fingerprint: model.backbone for model in models}
        names = [model.checkpoint.name for model in models]
        with (
            ExitStack() as stack,
            self._span("predict", {"graft.models": names, "graft.images": len(images)}),
        ):
            # Admitted before anything is awaited: a backbone cannot be closed between the choice of a model and its place in the queue.
            tickets = {
                name: stack.enter_context(one.batcher.admit(len(images), deadline))
                for name, one in backbones.items()
            }
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    features = await self._features(backbones, tickets, images)
            except TimeoutError:
                raise deadline_exceeded() from None
        return [_answer(model, features) for model in models]

    async def _features(
        self,
        backbones: Mapping[str, Backbone],
        tickets: Mapping[str, Ticket],
        images: Sequence[bytes | Pixels],
    ) -> list[FeaturesByBackbone | ImageError]:
        """Features of each image, with no more under way than keeps the engines busy: what several ask for is held as crops."""
        if len(images) == 1:
            return [await self._features_of_one(backbones, tickets, images[0])]
        results: list[FeaturesByBackbone | ImageError] = [ImageError("not decoded")] * len(images)
        pending = iter(enumerate(images))

        async def work() -> None:
            for index, image in pending:
                results[index] = await self._features_of_one(backbones, tickets, image)

        engines = [backbone.engine for backbone in backbones.values()]
        num_workers = min(
            len(images), 2 * max(engine.num_slots * engine.info.batch_size for engine in engines)
        )
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_workers):
                    group.create_task(work())
        # One failure cancels the rest; what it was is what the request is answered with.
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return results

    async def _features_of_one(
        self,
        backbones: Mapping[str, Backbone],
        tickets: Mapping[str, Ticket],
        image: bytes | Pixels,
    ) -> FeaturesByBackbone | ImageError:
        key = b""
        if self._cache is not None and isinstance(image, bytes):
            key = hashlib.blake2b(image, digest_size=16).digest()
            if found := self._cache.find(backbones, key):
                return found
        try:
            # One after the other: a request takes one place at a time, however many backbones it asks.
            found = {
                name: await self._features_by(backbone, tickets[name], image)
                for name, backbone in backbones.items()
            }
        except ImageError as error:
            return error
        if key and self._cache is not None:
            self._cache.add(key, found)
        return found

    async def _features_by(
        self, backbone: Backbone, ticket: Ticket, image: bytes | Pixels
    ) -> Features:
        if not isinstance(image, bytes):
            wanted = (backbone.preprocess.height, backbone.preprocess.width, 3)
            if image.shape != wanted:
                raise ImageError(
                    f"pixels are of shape {list(image.shape)}, this model takes {list(wanted)}"
                )
        with self._span("features", {"graft.backbone": backbone.fingerprint[:12]}):
            return await ticket.features(image)

    def _span(self, name: str, attributes: Mapping[str, Any]) -> AbstractContextManager[object]:
        # A span that goes nowhere still costs 50 µs.
        return (
            trace.get_tracer("graft").start_as_current_span(name, attributes=attributes)
            if self._is_traced
            else nullcontext()
        )


class FeatureCache:
    """The features of the images asked about last, by their bytes: an image that comes again costs neither decode nor engine."""

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._entries: OrderedDict[tuple[str, bytes], Features] = OrderedDict()

    def find(self, fingerprints: Mapping[str, object], key: bytes) -> FeaturesByBackbone | None:
        """The features of every one of these backbones, or None where one is missing."""
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
    rows = (
        iter(scores(model, readable[0][None] if len(readable) == 1 else np.stack(readable)))
        if readable
        else iter(())
    )
    return Answer(
        model, tuple(one if isinstance(one, ImageError) else next(rows) for one in features)
    )


def scores(model: Model, features: Features) -> Scores:
    """Features `[B,F]` → calibrated probabilities `[B,C]`."""
    scaled = logits(model.checkpoint, features)
    scaled /= model.checkpoint.temperature
    if model.checkpoint.thresholds is not None:
        return sigmoid(scaled)
    scaled -= np.maximum.reduce(scaled, axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= np.add.reduce(scaled, axis=1, keepdims=True)
    return scaled


def named_labels(row: Scores, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What an answer of probabilities `[C]` names: the best label; of a multi-label model those that reach their thresholds."""
    if checkpoint.thresholds is None:
        return (checkpoint.label_names[int(np.argmax(row))],)
    return tuple(
        checkpoint.label_names[column] for column in np.flatnonzero(row >= checkpoint.thresholds)
    )
