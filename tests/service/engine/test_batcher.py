"""The queue in front of an engine.

Order, fairness, cancellation, deadlines, overload, failures and shutdown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from models.engine.engine import EngineInfo
from models.images import ImageError, Pixels
from service.engine.batcher import Admission, Batcher
from service.engine.wire import Image, Outcome
from service.errors import RequestError
from tests.support.shared import HANG_SECONDS

Done = Callable[[Outcome | Exception], None]


def image(value: int) -> Pixels:
    """A 1x1 image whose one value is its name and its feature."""
    return np.full((1, 1, 3), value, np.uint8)


def outcome_of(images: Sequence[Image]) -> Outcome:
    """Each image's value as its feature; encoded images are unreadable for the reason they hold."""
    results = [
        ImageError(image.decode())
        if isinstance(image, bytes)
        else image[0, 0, :1].astype(np.float32)
        for image in images
    ]
    return Outcome(results, [0.001] * len(images), 0.001)


def value_of(image: Image) -> int:
    return -1 if isinstance(image, bytes) else int(image[0, 0, 0])


class ManualEngine:
    """An engine whose batches end when the test says so, so that nothing depends on time."""

    num_features = 1

    def __init__(
        self,
        *,
        batch_size: int = 1,
        num_slots: int = 1,
        num_streams: int | None = None,
        images_per_second: float = 1e6,
    ) -> None:
        self.info = EngineInfo(
            "manual", "test", "fp32", batch_size, num_streams or num_slots, images_per_second
        )
        self.num_slots = num_slots
        self.batches: list[list[int]] = []
        self.is_closed = False
        self._running: list[tuple[Sequence[Image], Done]] = []

    def start(self, images: Sequence[Image], done: Done) -> None:
        assert len(self._running) < self.num_slots
        assert len(images) <= self.info.batch_size
        self.batches.append([value_of(one) for one in images])
        self._running.append((images, done))

    def close(self) -> None:
        assert not self._running
        self.is_closed = True

    async def finish(self, error: Exception | None = None) -> None:
        """Finish the oldest batch, and let the event loop deliver its results."""
        images, done = self._running.pop(0)
        done(outcome_of(images) if error is None else error)
        await settle()

    async def finish_all(self) -> None:
        while self._running:
            await self.finish()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def in_seconds(seconds: float) -> float:
    return time.monotonic() + seconds


async def ask(batcher: Batcher, *values: int, seconds: float = 60) -> list[int]:
    """One request with an image for each value."""
    with batcher.admit(len(values), in_seconds(seconds)) as admission:
        features = await asyncio.gather(*(admission.features(image(value)) for value in values))
    return [int(feature[0]) for feature in features]


async def start(*requests: Awaitable[list[int]]) -> list[asyncio.Task[list[int]]]:
    """Start requests one after the other, so that they queue in this order."""
    tasks = []
    for request in requests:
        tasks.append(asyncio.ensure_future(request))
        await settle()
    return tasks


def test_every_image_gets_its_own_features_in_the_order_of_its_request() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=4, num_slots=2)
        batcher = Batcher(engine, max_images=100)
        tasks = await start(*(ask(batcher, *range(first, first + 7)) for first in range(0, 70, 7)))
        await engine.finish_all()
        assert [await task for task in tasks] == [
            list(range(first, first + 7)) for first in range(0, 70, 7)
        ]
        assert batcher.num_admitted == 0

    asyncio.run(scenario())


def test_a_batch_starts_at_once_and_takes_what_waits_when_a_slot_is_free() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=4, num_slots=2)
        batcher = Batcher(engine, max_images=100)
        tasks = await start(*(ask(batcher, value) for value in range(8)))
        assert engine.batches == [[0], [1]], (
            "no waiting window, and no more in flight than there are slots"
        )
        await engine.finish()
        assert engine.batches[2:] == [[2, 3, 4, 5]]
        await engine.finish()
        assert engine.batches[3:] == [[6, 7]]
        await engine.finish_all()
        assert [await task for task in tasks] == [[value] for value in range(8)]

    asyncio.run(scenario())


def test_a_slot_beyond_one_more_than_the_streams_waits_for_a_full_batch() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=3, num_slots=4, num_streams=1)
        batcher = Batcher(engine, max_images=100)
        tasks = await start(*(ask(batcher, value) for value in range(4)))
        assert engine.batches == [[0], [1]], (
            "one runs and one is decoded; two more images do not fill a batch"
        )
        tasks += await start(ask(batcher, 4))
        assert engine.batches[2:] == [[2, 3, 4]]
        tasks += await start(ask(batcher, 5, 6))
        assert engine.batches[3:] == []
        await engine.finish()
        assert engine.batches[3:] == [], "two are left in the engine: its stream stays busy"
        await engine.finish()
        assert engine.batches[3:] == [[5, 6]], "a stream would be idle: a partial batch starts"
        await engine.finish_all()
        assert [await task for task in tasks] == [[0], [1], [2], [3], [4], [5, 6]]

    asyncio.run(scenario())


def test_under_load_the_first_image_to_arrive_waits_for_others() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=2, num_slots=4, num_streams=1)
        batcher = Batcher(engine, max_images=100)
        tasks = await start(*(ask(batcher, value) for value in range(5)))
        assert engine.batches == [[0], [1], [2, 3]]
        await engine.finish()
        await engine.finish()
        assert engine.batches[3:] == [[4]], "it waited only until another batch was done"
        await engine.finish()
        # Five were admitted at once: more than a running batch and the next one.
        tasks += await start(ask(batcher, 5))
        assert engine.batches[4:] == [], "a slot is free, but more images are expected"
        tasks += await start(ask(batcher, 6))
        assert engine.batches[4:] == [[5, 6]]
        await engine.finish()
        tasks += await start(ask(batcher, 7))
        assert engine.batches[5:] == [[7]], "with fewer admitted nothing is waited for"
        await engine.finish_all()
        assert [await task for task in tasks] == [[value] for value in range(8)]

    asyncio.run(scenario())


def test_one_request_fills_a_batch_by_itself() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=3, num_slots=4, num_streams=1)
        batcher = Batcher(engine, max_images=100)
        tasks = await start(ask(batcher, *range(9)))
        assert engine.batches == [[0], [1], [2, 3, 4], [5, 6, 7]]
        await engine.finish_all()
        assert [await task for task in tasks] == [list(range(9))]

    asyncio.run(scenario())


def test_single_images_are_served_in_order_of_arrival() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=100)
        await start(*(ask(batcher, value) for value in range(6)))
        await engine.finish_all()
        assert engine.batches == [[value] for value in range(6)]

    asyncio.run(scenario())


def test_a_request_with_many_images_does_not_delay_one_with_few() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=100)
        many, few, one = await start(
            ask(batcher, *range(20)), ask(batcher, 50, 51), ask(batcher, 60)
        )
        for _ in range(7):
            await engine.finish()
        assert one.done()
        assert few.done()
        assert not many.done()
        await engine.finish_all()
        assert await many == list(range(20))

    asyncio.run(scenario())


def test_a_cancelled_request_costs_no_compute_and_frees_its_places() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=5)
        first, cancelled, last = await start(
            ask(batcher, 1), ask(batcher, 2, 3, 4), ask(batcher, 5)
        )
        cancelled.cancel()
        await settle()
        assert batcher.num_admitted == 2
        await engine.finish_all()
        assert (await first, await last) == ([1], [5])
        assert engine.batches == [[1], [5]]
        assert batcher.num_admitted == 0

    asyncio.run(scenario())


def test_a_request_cancelled_while_it_is_computed_harms_no_other() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=2)
        batcher = Batcher(engine, max_images=10)
        _, cancelled, other = await start(ask(batcher, 0), ask(batcher, 1), ask(batcher, 2))
        await engine.finish()
        assert engine.batches[-1] == [1, 2]
        cancelled.cancel()
        await engine.finish_all()
        assert await other == [2]
        assert batcher.num_admitted == 0

    asyncio.run(scenario())


def test_expired_images_are_dropped_before_compute() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=10)
        first, late, patient = await start(
            ask(batcher, 1), ask(batcher, 2, seconds=0.01), ask(batcher, 3)
        )
        await asyncio.sleep(0.02)
        await engine.finish_all()
        with pytest.raises(RequestError) as raised:
            await late
        assert raised.value.code == "deadline_exceeded"
        assert (await first, await patient) == ([1], [3])
        assert engine.batches == [[1], [3]]

    asyncio.run(scenario())


def test_the_queue_is_bounded_and_opens_again() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=3)
        tasks = await start(ask(batcher, 1), ask(batcher, 2, 3))
        with pytest.raises(RequestError) as raised:
            batcher.admit(1, in_seconds(60))
        assert raised.value.code == "overloaded"
        assert raised.value.retry_after_seconds is not None
        assert raised.value.retry_after_seconds >= 1
        await engine.finish()
        tasks += await start(ask(batcher, 4))
        await engine.finish_all()
        assert [await task for task in tasks] == [[1], [2, 3], [4]]

    asyncio.run(scenario())


def test_a_request_that_cannot_be_done_in_time_is_refused_at_once() -> None:
    async def scenario() -> None:
        batcher = Batcher(ManualEngine(images_per_second=10), max_images=1000)
        for _ in range(7):
            batcher.admit(1, in_seconds(4))
        with pytest.raises(RequestError) as raised:
            batcher.admit(12, in_seconds(2))
        assert raised.value.code == "overloaded"
        batcher.admit(12, in_seconds(4))

    asyncio.run(scenario())


def test_a_request_that_would_mostly_wait_is_refused_though_there_is_time() -> None:
    async def scenario() -> None:
        batcher = Batcher(ManualEngine(images_per_second=10), max_images=1000)
        batcher.admit(50, in_seconds(10))
        for _ in range(19):
            batcher.admit(1, in_seconds(10))
        with pytest.raises(RequestError) as raised:
            batcher.admit(1, in_seconds(10))
        assert raised.value.code == "overloaded"
        batcher.admit(1, in_seconds(12))

    asyncio.run(scenario())


def test_the_predicted_time_counts_that_few_images_go_between_many() -> None:
    async def scenario() -> None:
        batcher = Batcher(ManualEngine(images_per_second=10), max_images=1000)
        batcher.admit(100, in_seconds(60))
        assert batcher.predict_seconds(1) == pytest.approx(0.2)
        batcher.admit(1, in_seconds(1))
        with pytest.raises(RequestError):
            batcher.admit(50, in_seconds(1))

    asyncio.run(scenario())


def test_an_idle_engine_takes_requests_however_slow_it_measured() -> None:
    async def scenario() -> None:
        engine = ManualEngine(images_per_second=0.01)
        batcher = Batcher(engine, max_images=10)
        (task,) = await start(ask(batcher, 1, seconds=1))
        await engine.finish()
        assert await task == [1]

    asyncio.run(scenario())


def test_a_check_refuses_as_admission_would_and_admits_nothing() -> None:
    async def scenario() -> None:
        batcher = Batcher(ManualEngine(), max_images=2)
        deadline = time.monotonic() + 60
        batcher.check(2, deadline)
        assert batcher.num_admitted == 0
        with batcher.admit(2, deadline), pytest.raises(RequestError) as refused:
            batcher.check(1, deadline)
        assert refused.value.code == "overloaded"
        batcher.check(1, deadline)

    asyncio.run(scenario())


class SlowEngine(ManualEngine):
    """Takes 10 ms an image, and says that it takes 1 µs."""

    def start(self, images: Sequence[Image], done: Done) -> None:
        asyncio.get_running_loop().call_later(0.01, done, outcome_of(images))


@pytest.mark.alone
def test_the_speed_is_measured_under_load() -> None:
    async def scenario() -> None:
        batcher = Batcher(SlowEngine(), max_images=1000)
        assert batcher.predict_seconds(1) < 0.001
        await ask(batcher, *range(100))
        assert 0.007 < batcher.predict_seconds(1) < 0.1

    asyncio.run(scenario())


def test_a_failing_batch_fails_alone() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=10)
        failed, fine = await start(ask(batcher, 1), ask(batcher, 2))
        await engine.finish(ValueError("out of memory"))
        await engine.finish_all()
        with pytest.raises(RequestError) as raised:
            await failed
        assert raised.value.code == "engine_failed"
        assert "memory" not in raised.value.message
        assert await fine == [2]
        assert batcher.num_admitted == 0

    asyncio.run(scenario())


def test_an_engine_that_refuses_a_batch_does_not_stop_the_queue() -> None:
    class Refusing(ManualEngine):
        def start(self, images: Sequence[Image], done: Done) -> None:
            if value_of(images[0]) == 13:
                raise RuntimeError("unlucky")
            super().start(images, done)

    async def scenario() -> None:
        engine = Refusing()
        batcher = Batcher(engine, max_images=10)
        unlucky, fine = await start(ask(batcher, 13), ask(batcher, 1))
        await engine.finish_all()
        with pytest.raises(RequestError):
            await unlucky
        assert await fine == [1]

    asyncio.run(scenario())


def test_an_unreadable_image_fails_alone_and_the_rest_of_its_batch_runs() -> None:
    async def scenario() -> None:
        engine = ManualEngine(batch_size=3)
        batcher = Batcher(engine, max_images=10)

        async def ask_broken() -> list[int]:
            with (
                batcher.admit(1, in_seconds(60)) as admission,
                pytest.raises(ImageError, match="empty"),
            ):
                await admission.features(b"the file is empty")
            return []

        first, unread, *fine = await start(
            ask(batcher, 0), ask_broken(), ask(batcher, 1), ask(batcher, 2)
        )
        await engine.finish_all()
        assert engine.batches == [[0], [-1, 1, 2]]
        assert [await task for task in (first, unread, *fine)] == [[0], [], [1], [2]]
        assert batcher.num_admitted == 0

    asyncio.run(scenario())


def test_closing_finishes_admitted_requests_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=10)
        tasks = await start(ask(batcher, 1), ask(batcher, 2))
        closing = asyncio.create_task(batcher.close())
        await settle()
        with pytest.raises(RequestError) as raised:
            batcher.admit(1, in_seconds(60))
        assert raised.value.code == "shutting_down"
        assert not closing.done()
        await engine.finish_all()
        assert [await task for task in tasks] == [[1], [2]]
        await asyncio.wait_for(closing, HANG_SECONDS)
        assert engine.is_closed

    asyncio.run(scenario())


def test_closing_an_idle_queue_returns() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        await asyncio.wait_for(Batcher(engine, max_images=1).close(), HANG_SECONDS)
        assert engine.is_closed

    asyncio.run(scenario())


def test_a_stalled_engine_is_reported() -> None:
    async def scenario() -> None:
        engine = ManualEngine()
        batcher = Batcher(engine, max_images=10)
        assert batcher.stalled_seconds() == 0
        (task,) = await start(ask(batcher, 1))
        await asyncio.sleep(0.02)
        assert batcher.stalled_seconds() >= 0.02
        await engine.finish_all()
        await task
        assert batcher.stalled_seconds() == 0

    asyncio.run(scenario())


def test_a_thousand_requests_with_every_tenth_cancelled_leave_nothing_behind() -> None:
    async def scenario() -> None:
        class Immediate(ManualEngine):
            def start(self, images: Sequence[Image], done: Done) -> None:
                asyncio.get_running_loop().call_later(0.0005, done, outcome_of(images))

        batcher = Batcher(Immediate(batch_size=8, num_slots=3), max_images=100_000)
        tasks = [asyncio.create_task(ask(batcher, *range(index % 5 + 1))) for index in range(1000)]
        await settle()
        for task in tasks[::10]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for index, result in enumerate(results):
            if index % 10:
                assert result == list(range(index % 5 + 1))
        assert batcher.num_admitted == 0

    asyncio.run(scenario())


def test_an_admission_that_has_ended_takes_no_more_images() -> None:
    async def scenario() -> None:
        with Batcher(ManualEngine(), max_images=1).admit(1, in_seconds(1)) as admission:
            assert isinstance(admission, Admission)
        with pytest.raises(AssertionError):
            await admission.features(image(1))

    asyncio.run(scenario())
