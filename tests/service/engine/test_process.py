"""An engine in a process of its own.

It answers as an engine here would, images fail alone, and each process notices the other's end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from models.checkpoint import load_checkpoint
from models.engine.engine import run
from models.errors import GraftError
from models.images import ImageError, ImageTooLargeError, Pixels
from models.prepared import build_engine
from service.engine.process import EngineProcess
from service.engine.wire import Image, Outcome
from tests.support.images import draw_image
from tests.support.servers import LABELS
from tests.support.shared import HANG_SECONDS

MAX_PIXELS = 500_000


@pytest.fixture
def engine(colors: Path) -> Iterator[EngineProcess]:
    checkpoint = load_checkpoint(colors)
    options: dict[str, Any] = {"batch_size": 2, "num_streams": 2, "images_per_second": 100.0}
    process = EngineProcess(
        colors,
        checkpoint.preprocess,
        checkpoint.config,
        max_pixels=MAX_PIXELS,
        device="cpu",
        **options,
    )
    yield process
    process.close()


async def ask(engine: EngineProcess, *images: Image) -> Outcome | Exception:
    answered: asyncio.Future[Outcome | Exception] = asyncio.get_running_loop().create_future()
    engine.start(images, answered.set_result)
    return await asyncio.wait_for(answered, HANG_SECONDS)


def outcome_of(answer: Outcome | Exception) -> Outcome:
    assert isinstance(answer, Outcome)
    return answer


def crops_of(colors: Path, *images: bytes) -> Pixels:
    preprocess = load_checkpoint(colors).preprocess
    return np.stack([preprocess(image) for image in images])


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_end_of(pid: int) -> None:
    end = time.monotonic() + HANG_SECONDS
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_answers_what_an_engine_here_would(engine: EngineProcess, colors: Path) -> None:
    checkpoint = load_checkpoint(colors)
    here = build_engine(
        colors, checkpoint.preprocess, checkpoint.config, device="cpu", batch_size=2
    )
    images = [draw_image(label, seed) for seed, label in enumerate(LABELS)]
    crops = crops_of(colors, *images)
    wanted = run(here, crops)
    here.close()
    assert (engine.info.engine, engine.info.precision) == (here.info.engine, here.info.precision)
    assert (engine.num_features, engine.num_slots) == (here.num_features, here.num_slots)
    np.testing.assert_array_equal(engine.run(crops), wanted)

    async def scenario() -> None:
        for given in (images, list(crops)):
            outcome = outcome_of(await ask(engine, *given))
            np.testing.assert_array_equal(np.array(outcome.results), wanted)
            assert len(outcome.decode_seconds) == 3
            assert 0 < outcome.engine_seconds < 5
        # As many at once as it has slots, each with its own answer.
        many = await asyncio.gather(
            *(ask(engine, images[index % 3]) for index in range(engine.num_slots))
        )
        for index, one in enumerate(many):
            np.testing.assert_array_equal(outcome_of(one).results[0], wanted[index % 3])

    asyncio.run(scenario())


def test_an_unreadable_image_fails_alone_with_the_reason(engine: EngineProcess) -> None:
    async def scenario() -> None:
        images = [
            draw_image("red"),
            b"not an image",
            draw_image("green", size=(1000, 900)),
            b"",
            draw_image("blue"),
        ]
        good, broken, large, empty, last = outcome_of(await ask(engine, *images)).results
        assert isinstance(good, np.ndarray)
        assert isinstance(last, np.ndarray)
        assert isinstance(broken, ImageError)
        assert "not an image" in str(broken)
        assert isinstance(large, ImageTooLargeError)
        assert "0.9 megapixels" in str(large)
        assert "empty" in str(empty)
        (alone,) = outcome_of(await ask(engine, b"")).results
        assert isinstance(alone, ImageError)

    asyncio.run(scenario())


def test_a_body_of_any_size_goes_through(engine: EngineProcess) -> None:
    async def scenario() -> None:
        image = draw_image("red")
        # More than a socket takes at once, many times over.
        huge = image + bytes(20_000_000)
        outcomes = await asyncio.gather(*(ask(engine, one) for one in (huge, image, huge)))
        for outcome in outcomes:
            np.testing.assert_array_equal(
                outcome_of(outcome).results[0], outcome_of(outcomes[1]).results[0]
            )

    asyncio.run(scenario())


def test_a_crop_that_does_not_fit_fails_alone(engine: EngineProcess, colors: Path) -> None:
    async def scenario() -> None:
        fits = crops_of(colors, draw_image("red"))[0]
        wrong, right = outcome_of(await ask(engine, fits[:5], fits)).results
        assert isinstance(wrong, RuntimeError)
        assert isinstance(right, np.ndarray)

    asyncio.run(scenario())
    with pytest.raises(GraftError, match="engine failed"):
        engine.run(np.zeros((1, 3, 3, 3), np.uint8))


def test_an_engine_that_cannot_be_loaded_raises_the_reason(colors: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(colors)
    with pytest.raises(GraftError, match=r"backbone\.xml"):
        EngineProcess(
            tmp_path, checkpoint.preprocess, checkpoint.config, max_pixels=1, device="cpu"
        )
    with pytest.raises(GraftError, match="fp16"):
        EngineProcess(
            colors,
            checkpoint.preprocess,
            checkpoint.config,
            max_pixels=1,
            device="cpu",
            precision="fp16",
        )
    with pytest.raises(GraftError, match=r"TypeError"):
        EngineProcess(
            colors,
            checkpoint.preprocess,
            checkpoint.config,
            max_pixels=1,
            device="cpu",
            no_such_option=1,
        )


def test_its_death_fails_the_batches_in_flight_and_is_reported(engine: EngineProcess) -> None:
    deaths: list[float] = []
    engine._on_death = lambda: deaths.append(time.monotonic())

    async def scenario() -> None:
        os.kill(engine.pid, signal.SIGSTOP)
        in_flight = [
            asyncio.create_task(ask(engine, draw_image("red"))) for _ in range(engine.num_slots)
        ]
        await asyncio.sleep(0.1)
        os.kill(engine.pid, signal.SIGKILL)
        for answer in await asyncio.gather(*in_flight):
            assert isinstance(answer, RuntimeError)
        assert len(deaths) == 1
        assert engine.is_dead
        with pytest.raises(RuntimeError, match="ended"):
            await ask(engine, draw_image("red"))
        with pytest.raises(GraftError, match="ended"):
            engine.run(np.zeros((1, 224, 224, 3), np.uint8))

    asyncio.run(scenario())
    wait_for_end_of(engine.pid)


def test_one_that_was_killed_can_be_closed(engine: EngineProcess) -> None:
    async def scenario() -> None:
        engine.attach()
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(HANG_SECONDS):
            while not engine.is_dead:
                await asyncio.sleep(0.01)
        for _ in range(2):
            engine.close()

    asyncio.run(scenario())
    wait_for_end_of(engine.pid)


def test_the_death_of_an_idle_process_is_noticed(engine: EngineProcess) -> None:
    async def scenario() -> None:
        engine.attach()
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while not engine.is_dead:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_it_outlives_signals_to_the_group_but_not_the_server(engine: EngineProcess) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)

    async def scenario() -> None:
        assert isinstance(outcome_of(await ask(engine, draw_image("red"))).results[0], np.ndarray)

    asyncio.run(scenario())
    engine.close()
    engine.close()
    wait_for_end_of(engine.pid)
