"""From encoded images to labels with scores, on a real engine: right labels, calibrated scores, bad images that fail alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models.engine import run
from models.preprocess import ImageError
from service.errors import RequestError
from service.predictor import Predictor, top_predictions
from service.repository import Model, load_repository
from service.schemas import Prediction
from service.settings import Settings
from tests.service_fixtures import LABELS, copy_checkpoint, draw_image, publish_once


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_once(tmp_path_factory)


@pytest.fixture(scope="module")
def model(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    repository_dir = tmp_path_factory.mktemp("repository")
    copy_checkpoint(colors, repository_dir, "colors", 1)
    return load_repository(Settings(CHECKPOINTS=repository_dir)).models["colors"]


@pytest.fixture(scope="module")
def predictor() -> Iterator[Predictor]:
    predictor = Predictor(decode_threads=2, max_pixels=1_000_000)
    yield predictor
    predictor.close()


def predict(predictor: Predictor, model: Model, *images: bytes, top_k: int = 5, seconds: float = 30) -> list[Prediction | ImageError]:
    return asyncio.run(predictor.predict(model, images, top_k=top_k, deadline=time.monotonic() + seconds))


def labels_of(results: list[Prediction | ImageError]) -> list[str]:
    return [result.label if isinstance(result, Prediction) else "unreadable" for result in results]


def test_labels_come_in_the_order_of_the_images(predictor: Predictor, model: Model) -> None:
    wanted = [LABELS[index % 3] for index in range(20)]
    results = predict(predictor, model, *(draw_image(label, seed + 100) for seed, label in enumerate(wanted)))
    assert labels_of(results) == wanted


def test_scores_are_the_softmax_of_the_logits_over_the_temperature(predictor: Predictor, model: Model) -> None:
    image = draw_image("green", 5)
    checkpoint = model.checkpoint
    features = run(model.backbone.engine, checkpoint.preprocess(image)[None])[0]
    logits = (checkpoint.head_weight @ features + checkpoint.head_bias) / checkpoint.temperature
    expected = np.exp(logits) / np.exp(logits).sum()
    (result,) = predict(predictor, model, image)
    assert isinstance(result, Prediction)
    assert {one.label: one.score for one in result.top} == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-5)
    assert [one.score for one in result.top] == sorted((one.score for one in result.top), reverse=True)
    assert (result.label, result.score) == (result.top[0].label, result.top[0].score)


def test_an_unreadable_image_fails_alone_and_in_its_place(predictor: Predictor, model: Model) -> None:
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


def test_an_answer_does_not_depend_on_its_company(predictor: Predictor, model: Model) -> None:
    images = [draw_image(LABELS[index % 3], index) for index in range(9)]
    together = predict(predictor, model, *images)
    alone = [predict(predictor, model, image)[0] for image in images]
    assert labels_of(together) == labels_of(alone)
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize(("top_k", "num_listed"), [(1, 1), (2, 2), (3, 3), (1000, 3)])
def test_top_k_lists_as_many_labels_as_there_are(predictor: Predictor, model: Model, top_k: int, num_listed: int) -> None:
    (result,) = predict(predictor, model, draw_image("blue"), top_k=top_k)
    assert isinstance(result, Prediction)
    assert len(result.top) == num_listed


def test_equal_scores_keep_the_order_of_the_labels() -> None:
    (prediction,) = top_predictions(np.array([[0.25, 0.25, 0.5, 0.0]], np.float32), ["a", "b", "c", "d"], 4)
    assert [one.label for one in prediction.top] == ["c", "a", "b", "d"]


@pytest.mark.parametrize("num_images", [1, 5])
def test_a_request_whose_time_is_over_says_so(predictor: Predictor, model: Model, num_images: int) -> None:
    with pytest.raises(RequestError) as raised:
        predict(predictor, model, *[draw_image("red")] * num_images, seconds=0)
    assert raised.value.code == "deadline_exceeded"
    assert model.backbone.batcher.num_admitted == 0


def test_requests_at_once_each_get_their_own_answer(predictor: Predictor, model: Model) -> None:
    async def scenario() -> None:
        deadline = time.monotonic() + 30
        wanted = [[LABELS[(first + index) % 3] for index in range(first % 4 + 1)] for first in range(24)]
        requests = [
            predictor.predict(model, [draw_image(label, seed) for label in labels], top_k=1, deadline=deadline)
            for seed, labels in enumerate(wanted)
        ]
        answers = await asyncio.gather(*requests)
        assert [labels_of(answer) for answer in answers] == wanted

    asyncio.run(scenario())
