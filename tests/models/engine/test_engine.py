"""Both engines give the network's features, to many threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np

from models.engine.engine import Engine, run
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.torch_engine import TorchEngine
from models.images import Pixels
from tests.support.shared import HANG_SECONDS


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_both_engines_give_the_networks_features(
    engine: OpenVINOEngine, torch_engine: TorchEngine, crops: Pixels
) -> None:
    by_openvino, by_torch = run(engine, crops), run(torch_engine, crops)
    assert by_openvino.shape == by_torch.shape == (10, 1280)
    assert by_openvino.dtype == by_torch.dtype == np.float32
    assert relative(by_openvino, by_torch) < 1e-4


def test_many_threads_at_once_each_get_their_own_features(
    any_engine: Engine, crops: Pixels
) -> None:
    expected = run(any_engine, crops)
    tolerance = 0 if isinstance(any_engine, OpenVINOEngine) else 1e-4
    errors: list[object] = []

    def ask(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(4):
            chosen = generator.integers(0, len(crops), int(generator.integers(1, 7)))
            difference = relative(run(any_engine, crops[chosen]), expected[chosen])
            if difference > tolerance:
                errors.append((seed, difference))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_more_batches_than_slots_may_be_in_flight(any_engine: Engine, crops: Pixels) -> None:
    assert any_engine.num_slots >= 2
    futures: list[Future[np.ndarray]] = [
        any_engine.submit(crops[index % 10 :][:2]) for index in range(4 * any_engine.num_slots)
    ]
    expected = run(any_engine, crops)
    for index, future in enumerate(futures):
        assert relative(future.result(), expected[index % 10 :][:2]) < 1e-4


def test_arrays_that_are_not_contiguous_or_not_writeable_are_taken(
    any_engine: Engine, crops: Pixels
) -> None:
    expected = run(any_engine, crops[::2])
    locked = crops[::2].copy()
    locked.flags.writeable = False
    assert relative(run(any_engine, locked), expected) < 1e-4
    mirrored = crops[:4, :, ::-1]
    assert relative(run(any_engine, mirrored), run(any_engine, mirrored.copy())) < 1e-4


def test_an_empty_batch_gives_no_features(any_engine: Engine, crops: Pixels) -> None:
    features = run(any_engine, crops[:0])
    assert features.shape == (0, 1280)
    assert features.dtype == np.float32


def test_images_of_another_size_fail_alone(any_engine: Engine, crops: Pixels) -> None:
    expected = run(any_engine, crops[:2])
    wrong = [any_engine.submit(crops[:4, :, :, :2]) for _ in range(2 * any_engine.num_slots)]
    for future in wrong:
        assert future.exception(timeout=HANG_SECONDS) is not None
    assert relative(any_engine.submit(crops[:2]).result(timeout=HANG_SECONDS), expected) < 1e-4
