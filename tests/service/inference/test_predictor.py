"""From encoded images to scores on a real engine.

The right labels, calibrated scores, and unreadable images that fail alone.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.images import ImageError, Pixels
from service.engine.batcher import ImageEngine
from service.engine.wire import Image, Outcome
from service.errors import RequestError
from service.inference.predictor import Predictor
from service.inference.repository import Model, load_snapshot
from service.settings import Settings
from service.tasks.single_label import PredictRow
from tests.support.images import draw_image
from tests.support.servers import LABELS, change_config, copy_checkpoint


@pytest.fixture(scope="module")
def model(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    repository_dir = tmp_path_factory.mktemp("repository")
    copy_checkpoint(colors, repository_dir, "colors", 1)
    return (
        load_snapshot(Settings(CHECKPOINTS=repository_dir, max_pixels=1_000_000))
        .models["colors"]
        .choose()
    )


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def predict(
    predictor: Predictor, model: Model, *images: bytes | Pixels, seconds: float = 30
) -> tuple[Any, ...]:
    (answer,) = asyncio.run(predictor.predict([model], images, deadline=time.monotonic() + seconds))
    return answer.results


def count_images(engine: ImageEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the engine gets from now on."""
    start, seen = engine.start, []

    def count(images: Sequence[Image], done: Callable[[Outcome | Exception], None]) -> None:
        seen.append(len(images))
        start(images, done)

    monkeypatch.setattr(engine, "start", count)
    return seen


def set_temperature(temperature: float, config: dict[str, Any]) -> None:
    config["graft"]["temperature"] = temperature


def labels_of(results: Sequence[Any]) -> list[str]:
    return [
        "unreadable" if isinstance(result, ImageError) else LABELS[int(np.argmax(result))]
        for result in results
    ]


def test_labels_come_in_the_order_of_the_images(predictor: Predictor, model: Model) -> None:
    wanted = [LABELS[index % 3] for index in range(20)]
    results = predict(
        predictor, model, *(draw_image(label, seed + 100) for seed, label in enumerate(wanted))
    )
    assert labels_of(results) == wanted


def test_scores_are_the_softmax_of_the_logits_over_the_temperature(
    predictor: Predictor, model: Model
) -> None:
    image = draw_image("green", 5)
    checkpoint = model.checkpoint
    features = model.backbone.engine.run(checkpoint.preprocess(image)[None])[0]
    logits = (checkpoint.head_weight @ features + checkpoint.head_bias) / checkpoint.temperature
    expected = np.exp(logits) / np.exp(logits).sum()
    (result,) = predict(predictor, model, image)
    assert not isinstance(result, ImageError)
    assert result == pytest.approx(expected, abs=1e-5)
    prediction = PredictRow.model_validate(model.task.tensorflow_row(result), from_attributes=True)
    assert prediction.scores == pytest.approx(expected, abs=1e-5)
    assert (prediction.label, prediction.score) == ("green", max(prediction.scores))


def test_an_unreadable_image_fails_alone_and_in_its_place(
    predictor: Predictor, model: Model
) -> None:
    good = draw_image("red")
    results = predict(predictor, model, b"not an image", good, b"", draw_image("blue"), good[:200])
    assert labels_of(results) == ["unreadable", "red", "unreadable", "blue", "unreadable"]


def test_only_unreadable_images(predictor: Predictor, model: Model) -> None:
    results = predict(predictor, model, b"x", b"y")
    assert [type(result) for result in results] == [ImageError, ImageError]


def test_too_many_pixels_are_refused_from_the_header(predictor: Predictor, model: Model) -> None:
    (result,) = predict(predictor, model, draw_image("red", size=(1200, 900)))
    assert isinstance(result, ImageError)
    assert "1200x900" in str(result)


def test_an_answer_does_not_depend_on_the_other_images(predictor: Predictor, model: Model) -> None:
    images = [draw_image(LABELS[index % 3], index) for index in range(9)]
    together = predict(predictor, model, *images)
    alone = tuple(predict(predictor, model, image)[0] for image in images)
    assert labels_of(together) == labels_of(alone)
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("num_images", [1, 5])
def test_a_request_past_its_deadline_fails(
    predictor: Predictor, model: Model, num_images: int
) -> None:
    with pytest.raises(RequestError) as raised:
        predict(predictor, model, *[draw_image("red")] * num_images, seconds=0)
    assert raised.value.code == "deadline_exceeded"
    assert model.backbone.batcher.num_admitted == 0


def test_requests_at_once_each_get_their_own_answer(predictor: Predictor, model: Model) -> None:
    async def scenario() -> None:
        deadline = time.monotonic() + 30
        wanted = [
            [LABELS[(first + index) % 3] for index in range(first % 4 + 1)] for first in range(24)
        ]
        requests = [
            predictor.predict(
                [model], [draw_image(label, seed) for label in labels], deadline=deadline
            )
            for seed, labels in enumerate(wanted)
        ]
        answers = await asyncio.gather(*requests)
        assert [labels_of(answer.results) for (answer,) in answers] == wanted

    asyncio.run(scenario())


def test_many_models_share_one_pass_and_answer_as_each_does_alone(
    predictor: Predictor, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, name in enumerate(("one", "two", "three")):
        changed = copy_checkpoint(colors, tmp_path, name, 1)
        change_config(changed, functools.partial(set_temperature, 1.0 + index))
    models = [
        served.choose() for served in load_snapshot(Settings(CHECKPOINTS=tmp_path)).models.values()
    ]
    images = [draw_image(label, 7) for label in LABELS]
    alone = [predict(predictor, model, *images) for model in models]
    batcher = models[0].backbone.batcher
    seen = count_images(batcher.engine, monkeypatch)
    answers = asyncio.run(predictor.predict(models, images, deadline=time.monotonic() + 30))
    assert sum(seen) == len(images)
    assert [answer.model for answer in answers] == models
    for answer, expected in zip(answers, alone, strict=True):
        assert np.array(answer.results) == pytest.approx(np.array(expected), abs=1e-4)
    assert not np.allclose(alone[0][0], alone[2][0], atol=1e-3)


def test_a_cached_image_is_not_run_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(cached_images=2)
    images = [draw_image(label, 9) for label in LABELS]
    first = [predict(predictor, model, image) for image in images]
    seen = count_images(model.backbone.engine, monkeypatch)
    assert np.array_equal(predict(predictor, model, images[2]), first[2])
    assert np.array_equal(predict(predictor, model, images[1]), first[1])
    assert seen == []
    # The cache holds two: the oldest is gone.
    assert np.array_equal(predict(predictor, model, images[0]), first[0])
    assert seen == [1]


def test_a_crop_is_taken_and_one_of_another_size_fails_alone(
    predictor: Predictor, model: Model
) -> None:
    image = draw_image("green", 3)
    crop = model.backbone.preprocess(image)
    encoded, given, wrong = predict(predictor, model, image, crop, crop[:100])
    assert np.array_equal(encoded, given)
    assert isinstance(wrong, ImageError)
    assert "[100, 224, 3]" in str(wrong)


def test_waiting_images_stay_encoded_in_the_servers_process(
    predictor: Predictor, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a queue of a thousand images would hold a thousand crops."""
    copy_checkpoint(colors, tmp_path, "colors", 1)
    model = load_snapshot(Settings(CHECKPOINTS=tmp_path)).models["colors"].choose()
    engine = model.backbone.engine
    seen = count_images(engine, monkeypatch)

    async def scenario() -> None:
        images = [draw_image(label) for label in LABELS]
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            requests = [
                asyncio.create_task(
                    predictor.predict([model], images, deadline=time.monotonic() + 30)
                )
                for _ in range(20)
            ]
            await asyncio.sleep(0.3)
            assert len(seen) == engine.num_slots
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        for answer in await asyncio.gather(*requests):
            assert labels_of(answer[0].results) == LABELS
        assert sum(seen) == 60

    asyncio.run(scenario())
