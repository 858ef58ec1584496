"""The queue in front of an engine: bounded, fair, and honest at the door about how long it will take.

What waits is encoded, a fraction of a crop's size: the engine's process decodes it, in the thread that then runs it.

A batch starts as soon as a stream would have nothing to do, with whatever waits, up to the engine's best batch, and beyond that as soon
as it is full; there is no waiting window. Requests take turns image by image, so one with 64 images does not hold up one with a single
image. What has expired or was given up is dropped before it costs compute. Everything runs on one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from models.engine.engine import EngineInfo, Features
from models.preprocess import ImageError
from service import metrics
from service.engine.wire import Image, Outcome
from service.errors import RequestError

logger = logging.getLogger("bentoml.graft")

# A request is refused where its predicted time is above this fraction of what it has: speed varies. And where it would wait for others'
# images for more than this fraction: in a storm a longer queue answers no more of them, only later, and holds their bytes.
_HEADROOM = 0.8
_PATIENCE = 0.2
# An image that waits: itself, who wants its features, and since when.
Waiting = tuple[Image, "asyncio.Future[Features]", float]
# The share of one image in the running mean of the speed: it forgets in about 50 images.
_WEIGHT_PER_IMAGE = 0.02
# Of the most images that were under way, what is left after a batch: of three times as many it is forgotten after ten.
_PEAK_KEPT = 0.9


class ImageEngine(Protocol):
    """What runs batches of images, up to `num_slots` at once."""

    info: EngineInfo
    num_slots: int

    def start(self, images: Sequence[Image], done: Callable[[Outcome | Exception], None]) -> None:
        """Run a batch; `done` is called on the event loop, later, with what became of it."""

    def close(self) -> None:
        """Let go of it; nothing may be in flight."""


class Ticket:
    """A request's place in the queue, held for as long as the request lives: `with batcher.admit(…) as ticket`."""

    def __init__(self, batcher: Batcher, num_images: int, deadline: float) -> None:
        self.deadline = deadline
        self.num_left = num_images
        self.waiting: deque[Waiting] = deque()
        self._batcher = batcher

    async def features(self, image: Image) -> Features:
        """`float32 [F]`, when its turn has come. Raises ImageError where it cannot be read, and RequestError past the deadline."""
        return await self._batcher._enqueue(self, image)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._batcher._forget(self)


class Batcher:
    """Gathers images of many requests into batches for one engine. Deadlines are times of `time.monotonic()`."""

    def __init__(self, engine: ImageEngine, *, max_images: int, name: str = "") -> None:
        """`name` is what the metrics call it."""
        self.engine = engine
        self.name = name
        self._labels = (name,)
        self._max_images = max_images
        self._batch_size = max(1, engine.info.batch_size)
        self._num_slots = engine.num_slots
        # A batch in each stream, and one that is next.
        self._num_streams = min(engine.info.num_streams, self._num_slots)
        self._num_busy = min(self._num_streams + 1, self._num_slots)
        # The most images that were under way at once, of late.
        self._peak = 0.0
        # Below two full rounds of the engine nothing is refused: so many are served at once, and it keeps the speed measured.
        self._round = self._num_slots * self._batch_size
        self._seconds_per_image = 1 / max(engine.info.images_per_second, 0.01)
        self._last_finish: float | None = None
        self._tickets: set[Ticket] = set()
        self._turns: deque[Ticket] = deque()
        self._in_flight: set[_Batch] = set()
        self._is_closing = False
        self._drained = asyncio.Event()
        self.num_admitted = 0

    def admit(self, num_images: int, deadline: float) -> Ticket:
        """A place for `num_images`; raises RequestError (overloaded) at once where they would not be done by `deadline`."""
        self.check(num_images, deadline)
        ticket = Ticket(self, num_images, deadline)
        self._tickets.add(ticket)
        self.num_admitted += num_images
        return ticket

    def check(self, num_images: int, deadline: float) -> None:
        """Raises RequestError where `admit` would now, so that a body that would be read in vain is not."""
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
        # The quick bound first: only where the whole queue is too long is it counted what really comes before this request.
        if total > 2 * self._round and total * self._seconds_per_image > _PATIENCE * seconds_left:
            seconds = self.predict_seconds(num_images)
            wait = seconds - num_images * self._seconds_per_image
            excess = max(seconds - _HEADROOM * seconds_left, wait - _PATIENCE * seconds_left)
            if excess > 0:
                self._refuse(excess)

    @property
    def images_per_second(self) -> float:
        """What the queue reckons with: measured under load, else by the engine when it was loaded."""
        return 1 / self._seconds_per_image

    def predict_seconds(self, num_images: int) -> float:
        """Time until `num_images` that come now are done: requests take turns, so each goes ahead with as many at most."""
        # The count alone for one image, which is asked about every request of a storm.
        num_ahead = (
            len(self._tickets)
            if num_images == 1
            else sum(min(ticket.num_left, num_images) for ticket in self._tickets)
        )
        return (num_ahead + num_images) * self._seconds_per_image

    def stalled_seconds(self) -> float:
        """How long the oldest batch has been in the engine, 0 where there is none: a wedged engine shows here."""
        return (
            time.monotonic() - min(batch.started for batch in self._in_flight)
            if self._in_flight
            else 0.0
        )

    async def close(self) -> None:
        """Refuse what is new, finish what is in, then close the engine."""
        self._is_closing = True
        self._check_drained()
        await self._drained.wait()
        self.engine.close()
        metrics.forget_backbone(self.name)

    def _refuse(self, seconds: float) -> None:
        retry_after = max(1, math.ceil(seconds))
        raise RequestError(
            "overloaded",
            f"{self.num_admitted} images are waiting, too many to answer this request in time; try again in {retry_after} s",
            retry_after_seconds=retry_after,
        )

    async def _enqueue(self, ticket: Ticket, image: Image) -> Features:
        assert ticket in self._tickets, "features() of a ticket that was given back"
        future: asyncio.Future[Features] = asyncio.get_running_loop().create_future()
        ticket.waiting.append((image, future, time.monotonic()))
        if len(ticket.waiting) == 1:
            self._turns.append(ticket)
        self._dispatch(is_arrival=True)
        try:
            return await future
        finally:
            # A ticket that was given back meanwhile holds no places.
            if ticket.num_left:
                ticket.num_left -= 1
                self.num_admitted -= 1

    def _forget(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        self.num_admitted -= ticket.num_left
        ticket.num_left = 0
        for _, future, _ in ticket.waiting:
            future.cancel()
        self._check_drained()

    def _dispatch(self, *, is_arrival: bool = False) -> None:
        while self._has_slot(is_arrival) and (waiting := self._take_waiting()):
            self._start(_Batch(waiting))

    def _has_slot(self, is_arrival: bool) -> bool:
        """Whether a batch would be run at once, or next to the ones that are. Beyond that only a full one is worth a slot: at 16 clients
        two of three batches had a single image, and the engine answered 5 % fewer. Where enough is under way to fill the next one, the
        first image to arrive waits for its company, or until any batch is done: one of nine had it alone, and the engine answered fewer.
        """
        num_in_flight = len(self._in_flight)
        is_crowded = self._peak >= self._num_busy * self._batch_size
        num_for_any = self._num_streams if is_arrival and is_crowded else self._num_busy
        return num_in_flight < num_for_any or (
            num_in_flight < self._num_slots and self._fills_batch()
        )

    def _fills_batch(self) -> bool:
        num_missing = self._batch_size
        for ticket in self._turns:
            num_missing -= len(ticket.waiting)
            if num_missing <= 0:
                return True
        return False

    def _take_waiting(self) -> list[Waiting]:
        """One image of each waiting request in turn, until the batch is full or nothing waits."""
        taken: list[Waiting] = []
        now = time.monotonic()
        while self._turns and len(taken) < self._batch_size:
            ticket = self._turns.popleft()
            while ticket.waiting:
                image, future, since = ticket.waiting.popleft()
                if future.done():
                    continue
                if ticket.deadline <= now:
                    future.set_exception(deadline_exceeded())
                    continue
                taken.append((image, future, since))
                break
            if ticket.waiting:
                self._turns.append(ticket)
        return taken

    def _start(self, batch: _Batch) -> None:
        self._in_flight.add(batch)
        metrics.note(metrics.BATCH_IMAGES, self._labels, len(batch.waiting))
        for _, _, since in batch.waiting:
            metrics.note(metrics.QUEUE_SECONDS, self._labels, batch.started - since)
        try:
            self.engine.start(
                [image for image, _, _ in batch.waiting], partial(self._finish, batch)
            )
        # Whatever an engine raises concerns this batch alone, and must not stop the queue.
        except Exception as error:
            asyncio.get_running_loop().call_soon(self._finish, batch, error)

    def _finish(self, batch: _Batch, outcome: Outcome | Exception) -> None:
        self._in_flight.remove(batch)
        self._peak = max(self.num_admitted, _PEAK_KEPT * self._peak)
        self._measure(len(batch.waiting))
        self._dispatch()
        if isinstance(outcome, Exception):
            logger.error(
                "the engine failed on a batch of %d images", len(batch.waiting), exc_info=outcome
            )
            outcome = Outcome([outcome] * len(batch.waiting), (), 0.0)
        else:
            metrics.note(metrics.ENGINE_SECONDS, self._labels, outcome.engine_seconds)
        for seconds in outcome.decode_seconds:
            metrics.note(metrics.DECODE_SECONDS, (), seconds)
        for (_, future, _), result in zip(batch.waiting, outcome.results, strict=True):
            if future.done():
                continue
            if isinstance(result, ImageError):
                future.set_exception(result)
            elif isinstance(result, Exception):
                future.set_exception(
                    RequestError("engine_failed", "the engine failed on this image; try again")
                )
            else:
                future.set_result(result)
        self._check_drained()

    def _measure(self, num_images: int) -> None:
        """Learn the speed from the time between two batches, but only under load: an idle queue says nothing of capacity."""
        now = time.monotonic()
        is_loaded = self.num_admitted >= self._round
        if is_loaded and self._last_finish is not None:
            sample = (now - self._last_finish) / num_images
            self._seconds_per_image += min(1.0, num_images * _WEIGHT_PER_IMAGE) * (
                sample - self._seconds_per_image
            )
        self._last_finish = now if is_loaded else None

    def _check_drained(self) -> None:
        if self._is_closing and not self._tickets and not self._in_flight:
            self._drained.set()


class _Batch:
    """Images on their way through the engine together."""

    def __init__(self, waiting: list[Waiting]) -> None:
        self.waiting = waiting
        self.started = time.monotonic()


def deadline_exceeded() -> RequestError:
    return RequestError(
        "deadline_exceeded",
        "the answer could not be given in time; try again later",
        retry_after_seconds=1,
    )
