"""A ring keeps order, reuses buffers only when they were read, and survives errors."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from models.engine.engine import Features
from models.engine.ring import Ring, join
from models.images import Pixels
from tests.support.shared import HANG_SECONDS

SHAPE = (4, 2, 2, 3)


class Device:
    """Finishes batches later and in an order of its own, as copies on several streams may."""

    def __init__(self, delays: list[float]) -> None:
        self.delays = delays
        self.num_running = 0
        self.max_running = 0
        self.num_starting = 0
        self._threads = ThreadPoolExecutor(8)
        self._lock = threading.Lock()

    def open_slot(self) -> DelayedSlot:
        return DelayedSlot(self)

    def run(self, images: Pixels, delay: float) -> Features:
        time.sleep(delay)
        # Read at the end: a buffer that was written meanwhile shows here.
        features = images.reshape(len(images), -1).astype(np.float32)
        if (images == 255).all():
            raise RuntimeError("the device failed")
        return features

    def start(self, images: Pixels) -> Future[Features]:
        with self._lock:
            self.num_running += 1
            self.max_running = max(self.max_running, self.num_running)
            delay = self.delays.pop(0) if self.delays else 0.0
        return self._threads.submit(self.run, images, delay)


class DelayedSlot:
    def __init__(self, device: Device) -> None:
        self.images: Pixels = np.zeros(SHAPE, np.uint8)
        self._device = device
        self._running: Future[Features] | None = None

    def start(self, num_images: int) -> None:
        assert self._device.num_starting == 0, "two batches are started at once"
        self._device.num_starting += 1
        if (self.images[:num_images] == 254).all():
            self._device.num_starting -= 1
            raise RuntimeError("the device refused")
        self._running = self._device.start(self.images[:num_images])
        self._device.num_starting -= 1

    def wait(self) -> Features:
        assert self._running is not None
        try:
            return self._running.result()
        finally:
            self._device.num_running -= 1


@pytest.fixture
def device() -> Device:
    return Device([])


@pytest.fixture
def ring(device: Device) -> Iterator[Ring]:
    ring = Ring([device.open_slot() for _ in range(3)])
    yield ring
    ring.close()


def batch(value: int, num_images: int = 4) -> Pixels:
    return np.full((num_images, *SHAPE[1:]), value, np.uint8)


def test_batches_that_finish_out_of_order_answer_their_own_callers(
    ring: Ring, device: Device
) -> None:
    device.delays = [0.05, 0.0, 0.02, 0.0, 0.03, 0.01] * 5
    futures = [ring.submit(batch(value, 1 + value % 4)) for value in range(30)]
    for value, future in enumerate(futures):
        features = future.result(10)
        assert features.shape == (1 + value % 4, 12)
        assert (features == value).all()
    assert device.max_running == 3


def test_many_threads_never_start_two_batches_at_once(ring: Ring) -> None:
    def ask(value: int) -> bool:
        return bool((ring.submit(batch(value)).result(10) == value).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(200)))


def test_a_batch_that_fails_fails_alone(ring: Ring) -> None:
    """Whether the device raises at the start or at the wait; the slot is used again."""
    for value, message in [(255, "the device failed"), (254, "the device refused")] * 4:
        failed, other = ring.submit(batch(value)), ring.submit(batch(7))
        with pytest.raises(RuntimeError, match=message):
            failed.result(10)
        assert (other.result(10) == 7).all()


def test_a_crop_of_another_shape_is_refused_and_the_slot_used_again(ring: Ring) -> None:
    for _ in range(4):
        with pytest.raises(ValueError, match=r"\(3, 2, 3\).*\(2, 2, 3\)"):
            ring.submit(np.zeros((1, 3, 2, 3), np.uint8)).result(10)
    assert (ring.submit(batch(1)).result(10) == 1).all()


def test_submit_waits_only_while_every_slot_is_taken(ring: Ring, device: Device) -> None:
    device.delays = [0.2, 0.2, 0.2]
    started = time.perf_counter()
    for value in range(3):
        ring.submit(batch(value))
    assert time.perf_counter() - started < 0.15
    ring.submit(batch(3))
    assert time.perf_counter() - started > 0.15


def test_close_waits_for_what_is_in_flight(device: Device) -> None:
    device.delays = [0.05, 0.05]
    ring = Ring([device.open_slot() for _ in range(2)])
    futures = [ring.submit(batch(value)) for value in range(2)]
    ring.close()
    assert all(future.done() for future in futures)


def test_a_batch_too_large_for_a_slot_is_joined_from_several(ring: Ring) -> None:
    answers: queue.SimpleQueue[Features] = queue.SimpleQueue()
    joined = join([ring.submit(batch(1)), ring.submit(batch(2)), ring.submit(batch(3, 1))])
    joined.add_done_callback(lambda future: answers.put(future.result()))
    features = answers.get(timeout=HANG_SECONDS)
    assert features[:, 0].tolist() == [1.0] * 4 + [2.0] * 4 + [3.0]
    with pytest.raises(RuntimeError, match="the device failed"):
        join([ring.submit(batch(255)), ring.submit(batch(1))]).result(10)
