"""TensorFlow Serving's REST API: predictions, the status of versions, and their signatures.

    curl localhost:3000/v1/models/photos:predict \
        -d '{"instances": [{"b64": "'$(base64 -w0 photo.jpg)'"}]}'

https://www.tensorflow.org/tfx/serving/api_rest. The one input is `image_bytes`. The protocol has no
error per image: one that cannot be read fails the request, with its index.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.server import Server
from service.protocols.shared import (
    check_num_images,
    choose_one,
    decode_base64,
    parse_json,
    read_scores,
)
from service.tasks.choose import AnyColumns, AnyRows
from service.tasks.task import Task
from service.web.responses import json_response
from service.web.uploads import read_body

_EXAMPLE = '{"instances": [{"b64": "<an image file in base64>"}]}'
_INPUT = "image_bytes"
# By NumPy's kind of array; texts are objects.
_DTYPES = {"O": "DT_STRING", "f": "DT_FLOAT", "b": "DT_BOOL"}


class Base64Bytes(BaseModel):
    """Bytes in JSON."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(description="An image file in base64, or as a data: URL.")


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


class PredictRows(BaseModel):
    """The answer to `instances`."""

    predictions: AnyRows


class PredictOutputs(BaseModel):
    """The answer to `inputs`."""

    outputs: AnyColumns


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
    """A version, and `signature_def`: the names, types and shapes of its input and outputs."""

    model_spec: dict[str, str]
    metadata: dict[str, Any]


async def predict(request: Request, server: Server) -> Response:
    """`POST /v1/models/NAME:predict`: classify images in base64, as rows or as a column."""
    server.check_room()
    settings = server.settings
    with server.memory_budget.reserve() as reservation:
        body = await read_body(request, settings, reservation)
        # Enough for a few images too many, which are then refused by their number.
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
    scores = read_scores(answer, lambda index: f"{key}[{index}]")
    rows = [model.task.tensorflow_row(row) for row in scores]
    if key == "instances":
        return json_response(PredictRows.model_validate({"predictions": rows}))
    names = type(rows[0]).model_fields
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    return json_response(PredictOutputs.model_validate({"outputs": columns}))


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
        # A label, or a version that is not served, which raises.
        version = str(choose_one(server, name, version).checkpoint.version)
    if not statuses:
        choose_one(server, name)
    wanted = sorted(statuses, reverse=True) if not version else [int(version)]
    return json_response(ModelStatus(model_version_status=[statuses[one] for one in wanted]))


async def model_metadata(request: Request, server: Server) -> Response:
    """`GET /v1/models/NAME/metadata`: the signature of a version, by default of the default one."""
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
            metadata={
                "signature_def": {"signature_def": {"serving_default": _signature(model.task)}}
            },
        )
    )


def _version(request: Request) -> str:
    """The version's number or label in the path, "" where it has neither.

    Raises RequestError for a label in the place of a number, and the other way round.
    """
    version = request.path_params.get("version", "")
    if version and not (version.isascii() and version.isdigit() and len(version) < 10):
        raise RequestError(
            "bad_parameter",
            f"{version[:50]!r} is not a version's number; "
            f"labels are asked for as /labels/{version[:50]}",
        )
    label = request.path_params.get("label", "")
    if label.isdigit():
        raise RequestError(
            "bad_parameter",
            f"{label[:50]!r} is not a label; numbers are asked for as /versions/{label[:50]}",
        )
    return str(int(version)) if version else str(label)


def _signature(task: Task) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for output in task.outputs:
        sizes = (-1, len(task.label_names)) if output.is_per_label else (-1,)
        name: str = output.name
        if name == "probabilities":
            # TensorFlow Serving's own names: its classifiers answer with classes and their scores.
            outputs["classes"] = _tensor("classes", _DTYPES["O"], *sizes)
            name = "scores"
        outputs[name] = _tensor(name, _DTYPES[output.kind], *sizes)
    return {
        "inputs": {_INPUT: _tensor(_INPUT, _DTYPES["O"], -1)},
        "outputs": outputs,
        "method_name": "tensorflow/serving/predict",
    }


def _tensor(name: str, dtype: str, *sizes: int) -> dict[str, Any]:
    shape = {"dim": [{"size": str(size), "name": ""} for size in sizes], "unknown_rank": False}
    return {"name": name, "dtype": dtype, "tensor_shape": shape}
