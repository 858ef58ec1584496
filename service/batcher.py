"""The queue in front of an engine: bounded, fair, and honest at the door about how long it will take.

What waits is encoded, a fraction of a crop's size. The thread that runs a batch decodes it first: an image is handed from thread
to thread twice, there and back, for each hand-over waits for Python's lock and wakes another core.

A batch starts as soon as the engine has a free slot, with whatever waits, up to the engine's best batch; there is no waiting
window. Requests take turns image by image, so one with 64 images does not hold up one with a single image. What has expired
or was given up is dropped before it costs compute. Everything runs on one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from models.engine import Engine, Features, num_cpus
from models.preprocess import ImageError, Pixels
from service import metrics
from service.errors import RequestError

logger = logging.getLogger("bentoml.graft")

# A request is refused where its predicted time is above this fraction of what it has: speed varies. And where it would wait for others'
# images for more than this fraction: in a storm a longer queue answers no more of them, only later, and holds their bytes.
_HEADROOM = 0.8
_PATIENCE = 0.2
# Gives an image's crop, or raises ImageError. It is called in a thread.
MakeCrop = Callable[[], Pixels]
# An image that waits: how to make its crop, who wants its features, and since when.
Waiting = tuple[MakeCrop, "asyncio.Future[Features]", float]
# The share of one image in the running mean of the speed: it forgets in about 50 images.
_WEIGHT_PER_IMAGE = 0.02


class Ticket:
    """A request's place in the queue, held for as long as the request lives: `with batcher.admit(…) as ticket`."""

    def __init__(self, batcher: Batcher, num_images: int, deadline: float) -> None:
        self.deadline = deadline
        self.num_left = num_images
        self.waiting: deque[Waiting] = deque()
        self._batcher = batcher

    async def features(self, make_crop: MakeCrop) -> Features:
        """`uint8 [H,W,3]` → `float32 [F]`, when its turn has come. Raises what `make_crop` does, and RequestError past the deadline."""
        return await self._batcher._enqueue(self, make_crop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._batcher._forget(self)


class Batcher:
    """Gathers images of many requests into batches for one engine. Deadlines are times of `time.monotonic()`."""

    def __init__(self, engine: Engine, *, max_images: int, name: str = "") -> None:
        """`name` is what the metrics call it."""
        self.engine = engine
        self.name = name
        self._max_images = max_images
        self._batch_size = max(1, engine.info.batch_size)
        self._num_slots = engine.num_slots
        # Below two full rounds of the engine nothing is refused: so many are served at once, and it keeps the speed measured.
        self._round = self._num_slots * self._batch_size
        # Where the engine's threads alone would leave cores idle while they decode (a GPU has two), a batch is decoded by as many.
        has_idle_cores = self._batch_size > 1 and self._num_slots < num_cpus()
        self._decoders = ThreadPoolExecutor(num_cpus(), thread_name_prefix="decode") if has_idle_cores else None
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
            raise RequestError("shutting_down", "this server is shutting down; send the request to another", retry_after_seconds=1)
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
        num_ahead = len(self._tickets) if num_images == 1 else sum(min(ticket.num_left, num_images) for ticket in self._tickets)
        return (num_ahead + num_images) * self._seconds_per_image

    def stalled_seconds(self) -> float:
        """How long the oldest batch has been in the engine, 0 where there is none: a wedged engine shows here."""
        return time.monotonic() - min(batch.started for batch in self._in_flight) if self._in_flight else 0.0

    async def close(self) -> None:
        """Refuse what is new, finish what is in, then close the engine."""
        self._is_closing = True
        self._check_drained()
        await self._drained.wait()
        await asyncio.to_thread(self.engine.close)
        if self._decoders is not None:
            self._decoders.shutdown(wait=False)
        metrics.forget_backbone(self.name)

    def _refuse(self, seconds: float) -> None:
        retry_after = max(1, math.ceil(seconds))
        raise RequestError(
            "overloaded",
            f"{self.num_admitted} images are waiting, too many to answer this request in time; try again in {retry_after} s",
            retry_after_seconds=retry_after,
        )

    async def _enqueue(self, ticket: Ticket, make_crop: MakeCrop) -> Features:
        assert ticket in self._tickets, "features() of a ticket that was given back"
        future: asyncio.Future[Features] = asyncio.get_running_loop().create_future()
        ticket.waiting.append((make_crop, future, time.monotonic()))
        if len(ticket.waiting) == 1:
            self._turns.append(ticket)
            self._dispatch()
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

    def _dispatch(self) -> None:
        while len(self._in_flight) < self._num_slots and (waiting := self._take_waiting()):
            self._start(_Batch(waiting, self._decoders))

    def _take_waiting(self) -> list[Waiting]:
        """One image of each waiting request in turn, until the batch is full or nothing waits."""
        taken: list[Waiting] = []
        now = time.monotonic()
        while self._turns and len(taken) < self._batch_size:
            ticket = self._turns.popleft()
            while ticket.waiting:
                make_crop, future, since = ticket.waiting.popleft()
                if future.done():
                    continue
                if ticket.deadline <= now:
                    future.set_exception(deadline_exceeded())
                    continue
                taken.append((make_crop, future, since))
                break
            if ticket.waiting:
                self._turns.append(ticket)
        return taken

    def _start(self, batch: _Batch) -> None:
        loop = asyncio.get_running_loop()
        self._in_flight.add(batch)
        metrics.BATCH_IMAGES.labels(self.name).observe(len(batch.waiting))
        queue_seconds = metrics.QUEUE_SECONDS.labels(self.name)
        for _, _, since in batch.waiting:
            queue_seconds.observe(batch.started - since)
        try:
            running = self.engine.submit(batch.make_crops)
        # Whatever an engine raises concerns this batch alone, and must not stop the queue.
        except Exception as error:
            running = Future()
            running.set_exception(error)
        running.add_done_callback(lambda done: loop.call_soon_threadsafe(self._finish, batch, done))

    def _finish(self, batch: _Batch, done: Future[Features]) -> None:
        self._in_flight.remove(batch)
        self._measure(len(batch.waiting))
        self._dispatch()
        error = RuntimeError("cancelled inside the engine") if done.cancelled() else done.exception()
        if error is None:
            metrics.ENGINE_SECONDS.labels(self.name).observe(time.monotonic() - batch.decoded)
        elif not isinstance(error, ImageError):
            logger.error("the engine failed on a batch of %d images", len(batch.waiting), exc_info=error)
        rows: Iterator[Features] = iter(done.result() if error is None else ())
        for index, (_, future, _) in enumerate(batch.waiting):
            result: Features | Exception
            if index in batch.unreadable:
                result = batch.unreadable[index]
            elif error is None:
                result = next(rows)
            else:
                result = RequestError("engine_failed", "the engine failed on this image; try again")
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._check_drained()

    def _measure(self, num_images: int) -> None:
        """Learn the speed from the time between two batches, but only under load: an idle queue says nothing of capacity."""
        now = time.monotonic()
        is_loaded = self.num_admitted >= self._round
        if is_loaded and self._last_finish is not None:
            sample = (now - self._last_finish) / num_images
            self._seconds_per_image += min(1.0, num_images * _WEIGHT_PER_IMAGE) * (sample - self._seconds_per_image)
        self._last_finish = now if is_loaded else None

    def _check_drained(self) -> None:
        if self._is_closing and not self._tickets and not self._in_flight:
            self._drained.set()


class _Batch:
    """Images on their way through the engine together."""

    def __init__(self, waiting: list[Waiting], decoders: ThreadPoolExecutor | None) -> None:
        self.waiting = waiting
        self.unreadable: dict[int, ImageError] = {}
        self.started = self.decoded = time.monotonic()
        self._decoders = decoders if len(waiting) > 1 else None

    def make_crops(self) -> Pixels:
        """Of the readable ones, `uint8 [B,H,W,3]`; raises ImageError where there are none. Called in a thread of the engine's."""
        apply = map if self._decoders is None else self._decoders.map
        crops = []
        for index, crop in enumerate(apply(_try, [make_crop for make_crop, _, _ in self.waiting])):
            if isinstance(crop, ImageError):
                self.unreadable[index] = crop
            else:
                crops.append(crop)
        self.decoded = time.monotonic()
        if not crops:
            raise self.unreadable[0]
        return np.stack(crops)


def _try(make_crop: MakeCrop) -> Pixels | ImageError:
    try:
        return make_crop()
    except ImageError as error:
        return error


def deadline_exceeded() -> RequestError:
    return RequestError("deadline_exceeded", "the answer could not be given in time; try again later", retry_after_seconds=1)
