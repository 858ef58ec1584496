"""The OpenAPI page: every route, with the summary of its handler's docstring and the shapes below.

Of BentoML's description of `Graft.predict` only the form's fields are used: the rest loads pictures
from other hosts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, RootModel
from pydantic.json_schema import models_json_schema

from service.errors import STATUS_BY_CODE
from service.inference.rollout import Rollout
from service.protocols import admin, graft, health, hugging_face, open_inference, tf_serving
from service.protocols.schemas import (
    AllResponse,
    ErrorResponse,
    ModelsResponse,
    PredictResponse,
    ProtocolError,
    RolloutResponse,
    StatusResponse,
)
from service.tasks.task import LabelScore
from service.web.responses import plain_error
from service.web.route import Handler, Route

DESCRIPTION = (
    "Image classifiers that share their backbone: send images, get labels with calibrated scores."
)
# Of the HTTP interface, not of the models.
_API_VERSION = "1"
_REF = "#/components/schemas/{model}"
_BYTES = {"schema": {"type": "string", "format": "binary"}}


class PredictAnswer(RootModel[PredictResponse | AllResponse]):
    """The predictions of one model; with model=all, of each model."""


class TensorFlowAnswer(RootModel[tf_serving.PredictRows | tf_serving.PredictOutputs]):
    """As rows where the request had `instances`, as columns where it had `inputs`."""


class ImageLabels(RootModel[list[LabelScore]]):
    """Labels and calibrated probabilities, best first."""


@dataclass(frozen=True)
class Shapes:
    """The JSON that an operation answers and takes, and another type that its body may have."""

    response: type[BaseModel]
    request: type[BaseModel] | None = None
    binary: str = ""


# A handler that is not here answers with text.
_SHAPES: dict[Handler, Shapes] = {
    graft.predict: Shapes(PredictAnswer),
    graft.list_models: Shapes(ModelsResponse),
    health.status: Shapes(StatusResponse),
    admin.load_version: Shapes(RolloutResponse),
    admin.unload_version: Shapes(RolloutResponse),
    admin.patch_rollout: Shapes(RolloutResponse, Rollout),
    tf_serving.predict: Shapes(TensorFlowAnswer, tf_serving.PredictRequest),
    tf_serving.model_status: Shapes(tf_serving.ModelStatus),
    tf_serving.model_metadata: Shapes(tf_serving.ModelMetadata),
    open_inference.server_metadata: Shapes(open_inference.ServerMetadata),
    open_inference.live: Shapes(open_inference.ServerLive),
    open_inference.ready: Shapes(open_inference.ServerReady),
    open_inference.model_metadata: Shapes(open_inference.InferMetadata),
    open_inference.model_ready: Shapes(open_inference.ModelReady),
    open_inference.infer: Shapes(
        open_inference.InferResponse, open_inference.InferRequest, binary="application/octet-stream"
    ),
    hugging_face.classify_image: Shapes(
        ImageLabels, hugging_face.ImageClassificationRequest, binary="image/*"
    ),
}


def describe(spec: dict[str, Any], routes: Sequence[Route], *, needs_token: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of `routes`; `spec` is BentoML's own.

    With `needs_token` predictions and lists need the API token.
    """
    wanted: dict[tuple[type[BaseModel], Literal["serialization", "validation"]], None] = {
        (ErrorResponse, "serialization"): None,
        (ProtocolError, "serialization"): None,
    }
    for shapes in _SHAPES.values():
        wanted[shapes.response, "serialization"] = None
        if shapes.request is not None:
            wanted[shapes.request, "validation"] = None
    references, definitions = models_json_schema(list(wanted), ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        operation = _operation(route, references, needs_token)
        if route.handler is graft.predict:
            operation |= _predict(spec)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Graft",
            "version": _API_VERSION,
            "description": DESCRIPTION,
        },
        "servers": spec["servers"],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, references: dict[Any, Any], needs_token: bool) -> dict[str, Any]:
    shapes = _SHAPES.get(route.handler)
    error = ProtocolError if route.error_body is plain_error else ErrorResponse
    content = (
        {"application/json": {"schema": references[shapes.response, "serialization"]}}
        if shapes
        else {"*/*": {}}
    )
    if route.handler is open_inference.infer:
        content["application/octet-stream"] = _BYTES
    refused = {"content": {"application/json": {"schema": references[error, "serialization"]}}}
    statuses = sorted(set(STATUS_BY_CODE.values())) if route.handler is graft.predict else []
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}".lower()).strip("_"),
        "summary": _summary(route.handler),
        "tags": [route.handler.__module__.rpartition(".")[2]],
        "parameters": [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": "^[^/:]+$"},
            }
            for name in route.parameters
        ],
        "responses": {
            "200": {"description": "The answer", "content": content},
            **{
                str(status): {"description": HTTPStatus(status).phrase, **refused}
                for status in statuses
            },
            "default": {"description": "Why there is no answer, and what to do", **refused},
        },
    }
    if route.needs == "admin_token" or (route.needs == "api_token" and needs_token):
        operation["security"] = [{"bearer": []}]
    if shapes is not None and shapes.request is not None:
        body = {"application/json": {"schema": references[shapes.request, "validation"]}}
        operation["requestBody"] = {
            "required": True,
            "content": body | ({shapes.binary: _BYTES} if shapes.binary else {}),
        }
    return operation


def _predict(spec: dict[str, Any]) -> dict[str, Any]:
    """BentoML's form, its options as query parameters too, and a raw body."""
    form = spec["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"][
        "schema"
    ]
    options = {name: schema for name, schema in form["properties"].items() if name != "images"}
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema["description"],
                "schema": schema,
            }
            for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "image/*": _BYTES},
        },
    }


def _summary(handler: Handler) -> str:
    """The first line of the docstring without its leading address."""
    first = (handler.__doc__ or "").partition("\n")[0]
    text = re.sub(r"^`[^`]*`: ", "", first)
    return text[:1].upper() + text[1:]
