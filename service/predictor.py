"""Encoded images → predictions, without HTTP: decode in threads, the queue of the backbone, the head, calibrated scores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from models.checkpoint import logits
from models.engine import Features
from models.preprocess import ImageError
from service.batcher import Ticket, deadline_exceeded
from service.repository import Model
from service.schemas import LabelScore, Prediction

Scores = npt.NDArray[np.float32]


class Predictor:
    """Answers requests on models whose backbones it is given; owns the decode threads."""

    def __init__(self, *, decode_threads: int, max_pixels: int) -> None:
        self._threads = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._num_threads = decode_threads
        self._max_pixels = max_pixels

    async def predict(self, model: Model, images: Sequence[bytes], *, top_k: int, deadline: float) -> list[Prediction | ImageError]:
        """One entry per image, in order; an image that cannot be read fails alone, as the ImageError in its place.

        Raises RequestError where the queue is full, or the time of `deadline` (on `time.monotonic()`) has come.
        """
        with model.backbone.batcher.admit(len(images), deadline) as ticket:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    results = await self._features(model, ticket, images)
            except TimeoutError:
                raise deadline_exceeded() from None
        readable = [result for result in results if not isinstance(result, ImageError)]
        if not readable:
            return [result for result in results if isinstance(result, ImageError)]
        predictions = iter(top_predictions(scores(model, np.stack(readable)), model.checkpoint.label_names, top_k))
        return [result if isinstance(result, ImageError) else next(predictions) for result in results]

    def close(self) -> None:
        """Let the decode threads end; nothing may be in flight."""
        self._threads.shutdown()

    async def _features(self, model: Model, ticket: Ticket, images: Sequence[bytes]) -> list[Features | ImageError]:
        """Features of each image, with no more under way than keeps decoders and engine busy: others get their turn."""
        if len(images) == 1:
            return [await self._features_of_one(model, ticket, images[0])]
        results: list[Features | ImageError] = [ImageError("not decoded")] * len(images)
        pending = iter(enumerate(images))

        async def work() -> None:
            for index, data in pending:
                results[index] = await self._features_of_one(model, ticket, data)

        engine = model.backbone.engine
        num_workers = min(len(images), self._num_threads + engine.num_slots * engine.info.batch_size)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_workers):
                    group.create_task(work())
        # One failure cancels the rest; what it was is what the request is answered with.
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return results

    async def _features_of_one(self, model: Model, ticket: Ticket, data: bytes) -> Features | ImageError:
        decode = partial(model.backbone.preprocess, data, max_pixels=self._max_pixels)
        try:
            crop = await asyncio.get_running_loop().run_in_executor(self._threads, decode)
        except ImageError as error:
            return error
        return await ticket.features(crop)


def scores(model: Model, features: Features) -> Scores:
    """Features `[B,F]` → calibrated probabilities `[B,C]`."""
    scaled = logits(model.checkpoint, features) / model.checkpoint.temperature
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), np.float32)


def top_predictions(probabilities: Scores, label_names: Sequence[str], top_k: int) -> list[Prediction]:
    """Probabilities `[B,C]` → for each row its best label and the `top_k` best, ties in the order of the labels."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return [_prediction(row, columns, label_names) for row, columns in zip(probabilities, order, strict=True)]


def _prediction(row: Scores, columns: npt.NDArray[np.intp], label_names: Sequence[str]) -> Prediction:
    top = [LabelScore(label=label_names[column], score=round(float(row[column]), 6)) for column in columns]
    return Prediction(label=top[0].label, score=top[0].score, top=top)
