"""Graft's own protocol: `POST /predict`, images as a form or as the body, and `GET /v1/models`."""

from __future__ import annotations

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from models.checkpoint import ALL_MODELS
from models.images import ImageError
from service.errors import RequestError, image_error_code
from service.inference.predictor import Answer
from service.inference.repository import Served
from service.inference.server import Server
from service.protocols.schemas import (
    AllResponse,
    ErrorDetail,
    ErrorResponse,
    ModelInfo,
    ModelsResponse,
    PredictResponse,
    RefusedModel,
)
from service.tasks.task import Scores, Task
from service.web.numbers import parse_whole_number
from service.web.responses import json_response
from service.web.uploads import NamedImage, read_upload


async def predict(request: Request, server: Server) -> Response:
    """`POST /predict`: images in, predictions out; with model=all, every model's."""
    server.check_room()
    with server.memory_budget.reserve() as reservation:
        upload = await read_upload(request, server.settings, reservation)
        name = upload.options.get("model", "")
        models = server.choose(name, upload.options.get("version", ""))
        top_k = parse_top_k(upload.options.get("top_k", ""))
        answers = await server.classify(request, models, [image.data for image in upload.images])
    responses = [_predict_response(answer, upload.images, top_k) for answer in answers]
    return json_response(AllResponse(models=responses) if name == ALL_MODELS else responses[0])


async def list_models(request: Request, server: Server) -> Response:
    """`GET /v1/models`: what is served, on what, and what was refused and why."""
    if not server.is_loaded:
        server.check_ready()
    current = server.repository.current
    return json_response(
        ModelsResponse(
            models=[_model_info(served) for served in current.models.values()],
            refused=[
                RefusedModel(name=one.name, version=one.version, reason=one.reason)
                for one in current.refused
            ],
        )
    )


def parse_top_k(text: str) -> int | None:
    if not text:
        return None
    number = parse_whole_number(text, 1_000_000)
    if not number:
        raise RequestError("bad_parameter", f"top_k={text[:20]!r} is not a whole number from 1 up")
    return number


def check_readable(answer: Answer, names: list[str]) -> None:
    """Raises RequestError where none of the images could be read."""
    errors = [result for result in answer.results if isinstance(result, ImageError)]
    if len(errors) == len(answer.results):
        prefix = (
            ""
            if len(errors) == 1
            else f"none of the {len(errors)} images could be read; the first: "
        )
        raise RequestError(image_error_code(errors[0]), f"{prefix}{names[0]}: {errors[0]}")


def _predict_response(
    answer: Answer, images: list[NamedImage], top_k: int | None
) -> PredictResponse:
    check_readable(answer, [image.name for image in images])
    checkpoint = answer.model.checkpoint
    entries = [
        _entry(image, result, answer.model.task, top_k)
        for image, result in zip(images, answer.results, strict=True)
    ]
    return PredictResponse.model_validate(
        {"model": checkpoint.name, "version": checkpoint.version, "predictions": entries}
    )


def _entry(
    image: NamedImage, result: Scores | ImageError, task: Task, top_k: int | None
) -> BaseModel:
    if isinstance(result, ImageError):
        return ErrorResponse(
            error=ErrorDetail(code=image_error_code(result), message=f"{image.name}: {result}")
        )
    return task.prediction(result, top_k)


def _model_info(served: Served) -> ModelInfo:
    model = served.default
    checkpoint, info = model.checkpoint, model.info
    return ModelInfo(
        name=checkpoint.name,
        version=checkpoint.version,
        versions=sorted(served.versions),
        rollout=served.rollout,
        labels=list(checkpoint.label_names),
        architecture=checkpoint.architecture,
        fingerprint=checkpoint.fingerprint,
        metrics=dict(checkpoint.metrics),
        **model.task.limits(),
        device=info.device,
        engine=info.engine,
        precision=info.precision,
        batch_size=info.batch_size,
        num_streams=info.num_streams,
        images_per_second=round(info.images_per_second, 1),
    )
