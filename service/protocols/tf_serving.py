"""TensorFlow Serving's REST API: `POST /v1/models/NAME:predict`, the status of its versions, their signature.

    curl localhost:3000/v1/models/photos:predict -d '{"instances": [{"b64": "'$(base64 -w0 photo.jpg)'"}]}'

https://www.tensorflow.org/tfx/serving/api_rest. The one input is `image_bytes`. The protocol has no error per image: one that
cannot be read fails the request, with its index.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.predictor import Scores
from service.inference.repository import Model
from service.inference.server import Server
from service.protocols.shared import (
    check_num_images,
    check_uncompressed,
    choose_one,
    decode_base64,
    parse_json,
    read_scores,
    rounded,
)
from service.web.responses import json_response
from service.web.uploads import read_body

_EXAMPLE = '{"instances": [{"b64": "<an image file in base64>"}]}'
_INPUT = "image_bytes"


class Base64Bytes(BaseModel):
    """Bytes in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(description="An image file in base64.")


class NamedBytes(BaseModel):
    """The input by its name: one image in a row, or all of them in a column."""

    image_bytes: Base64Bytes | list[Base64Bytes]


def _unname(value: Any) -> Any:
    return value[_INPUT] if isinstance(value, dict) and set(value) == {_INPUT} else value


def _unname_column(value: Any) -> Any:
    column = _unname(value)
    return column if isinstance(column, list) else [column]


Row = Annotated[
    Base64Bytes, BeforeValidator(_unname, json_schema_input_type=Base64Bytes | NamedBytes)
]
Column = Annotated[
    list[Base64Bytes],
    Field(fail_fast=True),
    BeforeValidator(
        _unname_column, json_schema_input_type=Base64Bytes | list[Base64Bytes] | NamedBytes
    ),
]


class PredictRequest(BaseModel):
    """Images as rows (`instances`) or as a column (`inputs`), one of the two."""

    signature_name: Literal["", "serving_default"] = "serving_default"
    instances: Annotated[list[Row], Field(fail_fast=True)] | None = None
    inputs: Column | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.instances is None) == (self.inputs is None):
            raise ValueError("give either 'instances' (rows) or 'inputs' (a column)")
        return self


class PredictRow(BaseModel):
    """One image: its best label, and every class with its calibrated probability, in the model's order."""

    label: str
    score: float
    classes: list[str]
    scores: list[float]


class MultiLabelRow(BaseModel):
    """One image of a multi-label model: every class with its own calibrated probability, and whether that reaches its threshold."""

    classes: list[str]
    scores: list[float]
    present: list[bool]


class PredictRows(BaseModel):
    """The answer to `instances`."""

    predictions: list[PredictRow] | list[MultiLabelRow]


class PredictColumns(BaseModel):
    """The same, as columns."""

    label: list[str]
    score: list[float]
    classes: list[list[str]]
    scores: list[list[float]]


class MultiLabelColumns(BaseModel):
    """The same of a multi-label model."""

    classes: list[list[str]]
    scores: list[list[float]]
    present: list[list[bool]]


class PredictOutputs(BaseModel):
    """The answer to `inputs`."""

    outputs: PredictColumns | MultiLabelColumns


class VersionError(BaseModel):
    """Why a version is not served; `OK` where it is."""

    error_code: Literal["OK", "FAILED_PRECONDITION"] = "OK"
    error_message: str = ""


class VersionStatus(BaseModel):
    """A version that is served (AVAILABLE), or was refused (END)."""

    version: str
    state: Literal["AVAILABLE", "END"]
    status: VersionError


class ModelStatus(BaseModel):
    """The versions asked about, the newest first."""

    model_version_status: list[VersionStatus]


class ModelMetadata(BaseModel):
    """A version, and `signature_def` with the names, types and shapes of its input and its outputs."""

    model_spec: dict[str, str]
    metadata: dict[str, Any]


async def predict(request: Request, server: Server) -> Response:
    """`POST /v1/models/NAME:predict`: classify images in base64, as rows or as a column."""
    server.check_room()
    check_uncompressed(request)
    settings = server.settings
    with server.buffered.hold() as hold:
        body = await read_body(request, settings, hold)
        # Room for a few images too many, which are refused by their number.
        max_keys = 100 + 8 * settings.max_images
        asked = parse_json(
            body, PredictRequest, example=_EXAMPLE, max_keys=max_keys, max_values=max_keys
        )
        key, encoded = (
            ("instances", asked.instances)
            if asked.instances is not None
            else ("inputs", asked.inputs or [])
        )
        check_num_images(len(encoded), server)
        images = [decode_base64(one.b64, f"{key}[{index}]") for index, one in enumerate(encoded)]
        model = choose_one(server, request.path_params["name"], _version(request))
        (answer,) = await server.classify(request, [model], images)
    names = list(model.checkpoint.label_names)
    found = read_scores(answer, lambda index: f"{key}[{index}]")
    if model.checkpoint.thresholds is not None:
        return _respond_multi_label(
            names, found, model.checkpoint.thresholds, as_rows=key == "instances"
        )
    rows = [_row(names, scores) for scores in found]
    if key == "instances":
        return json_response(PredictRows(predictions=rows))
    columns = PredictColumns(
        label=[row.label for row in rows],
        score=[row.score for row in rows],
        classes=[row.classes for row in rows],
        scores=[row.scores for row in rows],
    )
    return json_response(PredictOutputs(outputs=columns))


async def model_status(request: Request, server: Server) -> Response:
    """`GET /v1/models/NAME`: which versions are served, and which were refused and why."""
    if not server.is_loaded:
        server.check_ready()
    name, version = request.path_params["name"], _version(request)
    current = server.repository.current
    statuses = {
        one.version: VersionStatus(
            version=str(one.version),
            state="END",
            status=VersionError(error_code="FAILED_PRECONDITION", error_message=one.reason),
        )
        for one in current.refused
        if one.name == name and one.version is not None
    }
    if name in current.models:
        statuses |= {
            one: VersionStatus(version=str(one), state="AVAILABLE", status=VersionError())
            for one in current.models[name].versions
        }
    if version and not (version.isdigit() and int(version) in statuses):
        # A label, or nothing that is here: then this says so.
        version = str(choose_one(server, name, version).checkpoint.version)
    if not statuses:
        choose_one(server, name)
    wanted = sorted(statuses, reverse=True) if not version else [int(version)]
    return json_response(ModelStatus(model_version_status=[statuses[one] for one in wanted]))


async def model_metadata(request: Request, server: Server) -> Response:
    """`GET /v1/models/NAME/metadata`: the signature of a version, by default the one that answers."""
    name, version = request.path_params["name"], _version(request)
    model = choose_one(server, name, version)
    if not version:
        model = server.repository.current.models[name].default
    return json_response(
        ModelMetadata(
            model_spec={
                "name": name,
                "signature_name": "",
                "version": str(model.checkpoint.version),
            },
            metadata={"signature_def": {"signature_def": {"serving_default": _signature(model)}}},
        )
    )


def _version(request: Request) -> str:
    """The number or the label of the address, "" where it has neither; raises RequestError where one stands in the other's place."""
    version = request.path_params.get("version", "")
    if version and not (version.isascii() and version.isdigit() and len(version) < 10):
        raise RequestError(
            "bad_parameter",
            f"{version[:50]!r} is not a version's number; labels are asked for as /labels/{version[:50]}",
        )
    label = request.path_params.get("label", "")
    if label.isdigit():
        raise RequestError(
            "bad_parameter",
            f"{label[:50]!r} is not a label; numbers are asked for as /versions/{label[:50]}",
        )
    return str(int(version)) if version else str(label)


def _row(names: list[str], scores: Scores) -> PredictRow:
    numbers = rounded(scores)
    best = int(np.argmax(scores))
    return PredictRow(label=names[best], score=numbers[best], classes=names, scores=numbers)


def _respond_multi_label(
    names: list[str], found: Scores, thresholds: Scores, *, as_rows: bool
) -> Response:
    rows = [
        MultiLabelRow(classes=names, scores=rounded(row), present=(row >= thresholds).tolist())
        for row in found
    ]
    if as_rows:
        return json_response(PredictRows(predictions=rows))
    columns = MultiLabelColumns(
        classes=[row.classes for row in rows],
        scores=[row.scores for row in rows],
        present=[row.present for row in rows],
    )
    return json_response(PredictOutputs(outputs=columns))


def _signature(model: Model) -> dict[str, Any]:
    num_classes = len(model.checkpoint.label_names)
    classes = {
        "classes": _tensor("classes", "DT_STRING", -1, num_classes),
        "scores": _tensor("scores", "DT_FLOAT", -1, num_classes),
    }
    if model.checkpoint.thresholds is None:
        outputs = {
            "label": _tensor("label", "DT_STRING", -1),
            "score": _tensor("score", "DT_FLOAT", -1),
            **classes,
        }
    else:
        outputs = {**classes, "present": _tensor("present", "DT_BOOL", -1, num_classes)}
    return {
        "inputs": {_INPUT: _tensor(_INPUT, "DT_STRING", -1)},
        "outputs": outputs,
        "method_name": "tensorflow/serving/predict",
    }


def _tensor(name: str, dtype: str, *sizes: int) -> dict[str, Any]:
    shape = {"dim": [{"size": str(size), "name": ""} for size in sizes], "unknown_rank": False}
    return {"name": name, "dtype": dtype, "tensor_shape": shape}
