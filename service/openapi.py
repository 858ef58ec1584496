"""The OpenAPI page: what BentoML derives from `Graft.predict`, made true where our own routes do more or answer otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.schemas import ErrorResponse, ModelsResponse, PredictResponse

_REF = "#/components/schemas/{model}"
# BentoML's own error shapes and task API, which no route of ours answers with.
_UNUSED_SCHEMAS = ("InvalidArgument", "NotFound", "InternalServerError", "TaskStatusResponse", "PredictResponseIODescriptor")


def describe(spec: dict[str, Any], error_statuses: Iterable[int]) -> dict[str, Any]:
    """BentoML's specification with raw bodies, query parameters, `GET /v1/models` and the one error shape."""
    shapes: list[type[BaseModel]] = [ErrorResponse, ModelsResponse, PredictResponse]
    _, definitions = models_json_schema([(shape, "serialization") for shape in shapes], ref_template=_REF)
    schemas = {name: schema for name, schema in spec["components"]["schemas"].items() if name not in _UNUSED_SCHEMAS}
    errors = {str(status): _answer(HTTPStatus(status).phrase, ErrorResponse) for status in sorted(set(error_statuses))}
    operation = spec["paths"]["/predict"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    options = {name: schema for name, schema in form["properties"].items() if name != "images"}
    predict = {
        **operation,
        "responses": {"200": _answer("One entry per image, in order", PredictResponse), **errors},
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": schema["description"], "schema": schema}
            for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form},
                "image/*": {"schema": {"type": "string", "format": "binary"}},
            },
        },
    }
    models = {
        "description": "What is served, on what, and which versions were refused and why.",
        "operationId": "Graft__models",
        "tags": operation["tags"],
        "responses": {"200": _answer("The models", ModelsResponse), "503": errors["503"]},
    }
    return {
        **spec,
        "components": {**spec["components"], "schemas": {**schemas, **definitions["$defs"]}},
        "paths": {**spec["paths"], "/predict": {"post": predict}, "/v1/models": {"get": models}},
    }


def _answer(description: str, shape: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": _REF.format(model=shape.__name__)}
    return {"description": description, "content": {"application/json": {"schema": reference}}}
