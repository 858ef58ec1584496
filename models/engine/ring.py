"""Batches in flight on a device: buffers that are used again, answers in the order of batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from models.engine.engine import Crops, Features
from models.images import Pixels


class Slot(Protocol):
    """The buffers of one batch on its way through a device."""

    images: Pixels
    """`uint8 [S,H,W,3]`, written before `start` and not read by the device after `wait`."""

    def start(self, num_images: int) -> None:
        """Run the first `num_images` of `images`; returns at once."""

    def wait(self) -> Features:
        """Wait for that batch: features `float32 [≥B,F]`, valid until the next `start`."""


class Ring:
    """Runs batches on the slots of a device, as many at once as there are slots.

    Batches are started one at a time, so the network that slots share needs no lock of its own.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.num_slots = len(slots)
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._started: queue.SimpleQueue[tuple[Slot, int, Future[Features]] | None] = (
            queue.SimpleQueue()
        )
        self._starting = threading.Lock()
        self._collector = threading.Thread(target=self._collect, name="engine-ring", daemon=True)
        self._collector.start()

    def submit(self, crops: Crops) -> Future[Features]:
        """`uint8 [B,H,W,3]`, a slot's size at most → `float32 [B,F]`; waits for a free slot."""
        future: Future[Features] = Future()
        slot = self._free.get()
        try:
            for index, crop in enumerate(crops):
                if crop.shape != slot.images.shape[1:]:
                    raise ValueError(
                        f"a crop of {crop.shape}; the engine takes {slot.images.shape[1:]}"
                    )
                slot.images[index] = crop
            with self._starting:
                slot.start(len(crops))
                self._started.put((slot, len(crops), future))
        except Exception as error:
            self._free.put(slot)
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Wait for what is in flight, and let the buffers go."""
        for _ in range(self.num_slots):
            self._free.get()
        self._started.put(None)
        self._collector.join()

    def _collect(self) -> None:
        while (started := self._started.get()) is not None:
            slot, num_images, future = started
            try:
                features = np.array(slot.wait()[:num_images])
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(features)
            self._free.put(slot)


def join(futures: Sequence[Future[Features]]) -> Future[Features]:
    """Features of several batches of one ring, one after another, or the first error of any."""
    joined: Future[Features] = Future()

    def finish(_: Future[Features]) -> None:
        try:
            joined.set_result(np.concatenate([future.result() for future in futures]))
        except Exception as error:
            joined.set_exception(error)

    # A ring answers in order: with the last, all are done.
    futures[-1].add_done_callback(finish)
    return joined
