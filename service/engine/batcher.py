"""The queue in front of an engine: bounded, fair, and admitting only what can be done in time.

Images wait encoded, a fraction of a crop's size, and are decoded in the engine's process.

A batch starts as soon as a stream of the engine would be idle, with whatever waits, up to the
engine's best batch size; beyond that, as soon as a batch is full. No timer waits for more images.
Requests take turns image by image, so that one with 64 images does not delay one with a single
image. Expired and cancelled images are dropped before they cost compute. Everything runs on one
event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from models.engine.engine import EngineInfo, Features
from models.images import ImageError
from service import metrics
from service.engine.wire import Image, Outcome, Result
from service.errors import RequestError

logger = logging.getLogger("bentoml.graft")

# A request is admitted where its predicted time is within the first fraction of the time it has
# left, because speed varies, and its wait for other requests' images within the second: under
# overload a longer queue answers no more requests, only later, and holds their bytes.
_MAX_TIME_FRACTION = 0.8
_MAX_WAIT_FRACTION = 0.2
# The weight of one image in the running mean of the speed, which forgets in about 50 images.
_WEIGHT_PER_IMAGE = 0.02
# How much of the recent peak of admitted images is left after a batch: after ten batches a third.
_PEAK_DECAY = 0.9


class ImageEngine(Protocol):
    """What runs batches of images, up to `num_slots` at once."""

    info: EngineInfo
    num_slots: int

    def start(self, images: Sequence[Image], done: Callable[[Outcome | Exception], None]) -> None:
        """Run a batch; `done` is called on the event loop, later."""

    def close(self) -> None:
        """Nothing may be in flight."""


class _WaitingImage(NamedTuple):
    """An image in the queue, where its features go, and since when it waits."""

    image: Image
    features: asyncio.Future[Features]
    since: float


class Admission:
    """A request's places in the queue, for as long as the `with` block around it lasts."""

    def __init__(self, batcher: Batcher, num_images: int, deadline: float) -> None:
        self.deadline = deadline
        self.num_unanswered = num_images
        self.waiting: deque[_WaitingImage] = deque()
        self._batcher = batcher

    async def features(self, image: Image) -> Features:
        """`float32 [F]` of one image.

        Raises ImageError where it cannot be read, and RequestError past the deadline.
        """
        return await self._batcher._enqueue(self, image)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._batcher._release(self)


class Batcher:
    """Joins images of many requests to batches of one engine.

    Deadlines are times of `time.monotonic()`.
    """

    def __init__(self, engine: ImageEngine, *, max_images: int, name: str = "") -> None:
        """`name` labels the metrics."""
        self.engine = engine
        self.name = name
        self.num_admitted = 0
        self._labels = (name,)
        self._max_images = max_images
        self._batch_size = max(1, engine.info.batch_size)
        self._num_slots = engine.num_slots
        self._num_streams = min(engine.info.num_streams, self._num_slots)
        # A batch in each stream, and the next one.
        self._num_partial_batches = min(self._num_streams + 1, self._num_slots)
        # Up to twice this nothing is refused: the engine takes so many at once, and they keep its
        # speed measured.
        self._max_in_engine = self._num_slots * self._batch_size
        self._recent_peak = 0.0
        self._seconds_per_image = 1 / max(engine.info.images_per_second, 0.01)
        self._last_finish: float | None = None
        self._admissions: set[Admission] = set()
        # Those with waiting images, in the order of their turns.
        self._turns: deque[Admission] = deque()
        self._in_flight: set[_Batch] = set()
        self._is_closing = False
        self._drained = asyncio.Event()

    def admit(self, num_images: int, deadline: float) -> Admission:
        """Places for `num_images`.

        Raises RequestError (overloaded) where they would not be done by `deadline`.
        """
        self.check(num_images, deadline)
        admission = Admission(self, num_images, deadline)
        self._admissions.add(admission)
        self.num_admitted += num_images
        return admission

    def check(self, num_images: int, deadline: float) -> None:
        """Raises RequestError where `admit` would, so that a body need not be read first."""
        if self._is_closing:
            raise RequestError(
                "shutting_down",
                "this server is shutting down; send the request to another",
                retry_after_seconds=1,
            )
        total = self.num_admitted + num_images
        seconds_left = deadline - time.monotonic()
        if total > self._max_images:
            self._refuse(total * self._seconds_per_image / 2)
        # The cheap bound first: the images ahead are counted only where the whole queue is long.
        max_wait = _MAX_WAIT_FRACTION * seconds_left
        if total > 2 * self._max_in_engine and total * self._seconds_per_image > max_wait:
            seconds = self.predict_seconds(num_images)
            wait = seconds - num_images * self._seconds_per_image
            excess = max(seconds - _MAX_TIME_FRACTION * seconds_left, wait - max_wait)
            if excess > 0:
                self._refuse(excess)

    @property
    def images_per_second(self) -> float:
        """Measured under load, before that by the engine when it was loaded."""
        return 1 / self._seconds_per_image

    def predict_seconds(self, num_images: int) -> float:
        """Time until `num_images` admitted now are done.

        Requests take turns, so each one goes ahead with as many images at most.
        """
        # For one image, which every request of an overload asks about, counting requests is enough.
        num_ahead = (
            len(self._admissions)
            if num_images == 1
            else sum(min(one.num_unanswered, num_images) for one in self._admissions)
        )
        return (num_ahead + num_images) * self._seconds_per_image

    def stalled_seconds(self) -> float:
        """How long the oldest batch has been in the engine, 0 where there is none."""
        if not self._in_flight:
            return 0.0
        return time.monotonic() - min(batch.started for batch in self._in_flight)

    async def close(self) -> None:
        """Refuse new requests, finish the admitted ones, then close the engine."""
        self._is_closing = True
        self._check_drained()
        await self._drained.wait()
        self.engine.close()
        metrics.forget_backbone(self.name)

    def _refuse(self, seconds: float) -> None:
        retry_after = max(1, math.ceil(seconds))
        raise RequestError(
            "overloaded",
            f"{self.num_admitted} images are waiting, too many to answer this request in time; "
            f"try again in {retry_after} s",
            retry_after_seconds=retry_after,
        )

    async def _enqueue(self, admission: Admission, image: Image) -> Features:
        assert admission in self._admissions, "features() after the end of the admission"
        features: asyncio.Future[Features] = asyncio.get_running_loop().create_future()
        admission.waiting.append(_WaitingImage(image, features, time.monotonic()))
        if len(admission.waiting) == 1:
            self._turns.append(admission)
        self._start_batches(is_arrival=True)
        try:
            return await features
        finally:
            # 0 where the admission ended meanwhile, which gave its places back.
            if admission.num_unanswered:
                admission.num_unanswered -= 1
                self.num_admitted -= 1

    def _release(self, admission: Admission) -> None:
        self._admissions.discard(admission)
        self.num_admitted -= admission.num_unanswered
        admission.num_unanswered = 0
        for waiting in admission.waiting:
            waiting.features.cancel()
        self._check_drained()

    def _start_batches(self, *, is_arrival: bool = False) -> None:
        while self._may_start_batch(is_arrival) and (images := self._take_batch()):
            self._start(_Batch(images, time.monotonic()))

    def _may_start_batch(self, is_arrival: bool) -> bool:
        """Whether a partial batch may start now, or a full one waits for a free slot.

        A partial batch starts where it would run at once or next. Beyond that only a full one is
        worth a slot: otherwise, at 16 clients, two of three batches had a single image and the
        engine answered 5 % fewer. Where enough images are admitted to fill the next batch, the
        first one to arrive waits for others, or until any batch is done: otherwise it was alone in
        one of nine batches.
        """
        num_in_flight = len(self._in_flight)
        is_busy = self._recent_peak >= self._num_partial_batches * self._batch_size
        max_partial = self._num_streams if is_arrival and is_busy else self._num_partial_batches
        return num_in_flight < max_partial or (
            num_in_flight < self._num_slots and self._fills_batch()
        )

    def _fills_batch(self) -> bool:
        num_missing = self._batch_size
        for admission in self._turns:
            num_missing -= len(admission.waiting)
            if num_missing <= 0:
                return True
        return False

    def _take_batch(self) -> list[_WaitingImage]:
        """One image of each request in turn, until the batch is full or nothing waits."""
        taken: list[_WaitingImage] = []
        now = time.monotonic()
        while self._turns and len(taken) < self._batch_size:
            admission = self._turns.popleft()
            if waiting := _take_live(admission, now):
                taken.append(waiting)
            if admission.waiting:
                self._turns.append(admission)
        return taken

    def _start(self, batch: _Batch) -> None:
        self._in_flight.add(batch)
        metrics.note(metrics.BATCH_IMAGES, self._labels, len(batch.images))
        for waiting in batch.images:
            metrics.note(metrics.QUEUE_SECONDS, self._labels, batch.started - waiting.since)
        try:
            self.engine.start(
                [waiting.image for waiting in batch.images], partial(self._finish, batch)
            )
        # Whatever an engine raises concerns this batch alone and must not stop the queue.
        except Exception as error:
            asyncio.get_running_loop().call_soon(self._finish, batch, error)

    def _finish(self, batch: _Batch, outcome: Outcome | Exception) -> None:
        self._in_flight.remove(batch)
        self._recent_peak = max(self.num_admitted, _PEAK_DECAY * self._recent_peak)
        self._measure_speed(len(batch.images))
        self._start_batches()
        if isinstance(outcome, Exception):
            logger.error(
                "the engine failed on a batch of %d images", len(batch.images), exc_info=outcome
            )
            outcome = Outcome([outcome] * len(batch.images), (), 0.0)
        else:
            metrics.note(metrics.ENGINE_SECONDS, self._labels, outcome.engine_seconds)
        for seconds in outcome.decode_seconds:
            metrics.note(metrics.DECODE_SECONDS, (), seconds)
        for waiting, result in zip(batch.images, outcome.results, strict=True):
            _resolve(waiting.features, result)
        self._check_drained()

    def _measure_speed(self, num_images: int) -> None:
        """From the time between two batches, under load only: an idle queue shows no capacity."""
        now = time.monotonic()
        is_loaded = self.num_admitted >= self._max_in_engine
        if is_loaded and self._last_finish is not None:
            sample = (now - self._last_finish) / num_images
            self._seconds_per_image += min(1.0, num_images * _WEIGHT_PER_IMAGE) * (
                sample - self._seconds_per_image
            )
        self._last_finish = now if is_loaded else None

    def _check_drained(self) -> None:
        if self._is_closing and not self._admissions and not self._in_flight:
            self._drained.set()


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images that run through the engine together."""

    images: list[_WaitingImage]
    started: float


def _take_live(admission: Admission, now: float) -> _WaitingImage | None:
    """The request's next image that somebody waits for; expired ones are answered so."""
    while admission.waiting:
        waiting = admission.waiting.popleft()
        if waiting.features.done():
            continue
        if admission.deadline > now:
            return waiting
        waiting.features.set_exception(deadline_exceeded())
    return None


def _resolve(features: asyncio.Future[Features], result: Result) -> None:
    if features.done():
        return
    if isinstance(result, ImageError):
        features.set_exception(result)
    elif isinstance(result, Exception):
        features.set_exception(
            RequestError("engine_failed", "the engine failed on this image; try again")
        )
    else:
        features.set_result(result)


def deadline_exceeded() -> RequestError:
    return RequestError(
        "deadline_exceeded",
        "the answer could not be given in time; try again later",
        retry_after_seconds=1,
    )
