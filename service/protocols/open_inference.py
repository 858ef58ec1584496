"""The Open Inference Protocol (v2) of KServe, Triton and others, over HTTP.

    tritonclient.http.InferenceServerClient("localhost:3000").infer("photos", [image])

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol, with Triton's
extensions for binary data and for classification. A request has one of two inputs:

- `image`, BYTES [N] or [N,1]: encoded files; in JSON as base64.
- `pixels`, UINT8 or FP32 [N,H,W,3]: crops of the model's size, RGB, values 0 to 255; FP32 is
  rounded and clipped.

The protocol has no error per image: one that cannot be read fails the request, with its index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from models.images import Pixels
from models.preprocess import Preprocess
from service.errors import RequestError
from service.inference.repository import Model
from service.inference.server import Server
from service.protocols.shared import (
    check_num_images,
    choose_one,
    decode_base64,
    parse_json,
    read_scores,
)
from service.tasks.task import OutputName, Scores, Task, rounded
from service.web.responses import json_response
from service.web.uploads import read_body

# Of these routes, not of the models.
_API_VERSION = "1"
_EXTENSIONS = ["binary_tensor_data", "classification"]
_HEADER_LENGTH = "Inference-Header-Content-Length"
_EXAMPLE = (
    '{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", '
    '"data": ["<an image file in base64>"]}]}'
)
# By NumPy's kind of array; texts are objects.
_DATATYPES: dict[str, Literal["BYTES", "FP32", "BOOL"]] = {"O": "BYTES", "f": "FP32", "b": "BOOL"}
_MAX_KEYS = 1000
# Three crops of 224x224; more come as binary data.
_MAX_VALUES = 500_000
# Pixels that were normalised with a mean and std are within, and are not whole numbers.
_MAX_NORMALISED = 4.0

FewDimensions = Annotated[list[int], Field(fail_fast=True, max_length=8)]


class RequestInput(BaseModel):
    """A tensor. Its elements are in `data`, flat or nested, or follow the JSON as binary data.

    The parameter `binary_data_size` is the number of those bytes.
    """

    name: Literal["image", "pixels"]
    shape: FewDimensions
    datatype: Literal["BYTES", "UINT8", "FP32"]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class RequestOutput(BaseModel):
    """One of the model's outputs to answer with.

    Its parameters are `binary_data` and, for `probabilities`, `classification`.
    """

    name: OutputName
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """One input, and the outputs to answer with, by default all.

    Of the parameters only `binary_data_output` has a meaning.
    """

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[RequestInput], Field(fail_fast=True, min_length=1, max_length=1)]
    outputs: Annotated[list[RequestOutput], Field(fail_fast=True, max_length=3)] | None = None


class ResponseOutput(BaseModel):
    """A tensor. Its elements are in `data`, flat, or follow the JSON as binary data.

    The parameter `binary_data_size` is the number of those bytes.
    """

    name: str
    datatype: Literal["BYTES", "FP32", "BOOL"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | list[bool] | None = None


class InferResponse(BaseModel):
    """Label BYTES [N], score FP32 [N] and probabilities FP32 [N,C], or those that were asked for.

    A multi-label model has probabilities and present BOOL [N,C]: whether each label's probability
    reaches its threshold.
    """

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[ResponseOutput]


class TensorMetadata(BaseModel):
    """A tensor of any number of images: -1."""

    name: str
    datatype: str
    shape: list[int]


class InferMetadata(BaseModel):
    """A model's tensors; a request has one of the inputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """This server and the extensions that it has."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Whether the server is up."""

    live: bool


class ServerReady(BaseModel):
    """Whether the server takes requests."""

    ready: bool


class ModelReady(BaseModel):
    """Whether the model takes requests."""

    name: str
    ready: bool


@dataclass(frozen=True)
class Wanted:
    """One output of a request; with `num_classes`, so many texts `probability:index:label`."""

    name: OutputName
    is_binary: bool
    num_classes: int | None = None


async def server_metadata(request: Request, server: Server) -> Response:
    """`GET /v2`: the server's name and the extensions that it has."""
    return json_response(ServerMetadata(name="graft", version=_API_VERSION, extensions=_EXTENSIONS))


async def live(request: Request, server: Server) -> Response:
    """`GET /v2/health/live`: as /livez."""
    server.check_alive()
    return json_response(ServerLive(live=True))


async def ready(request: Request, server: Server) -> Response:
    """`GET /v2/health/ready`: as /readyz."""
    server.check_healthy()
    return json_response(ServerReady(ready=True))


async def model_ready(request: Request, server: Server) -> Response:
    """`GET /v2/models/NAME/ready`: 200 where this model, or this version of it, is served."""
    server.check_healthy()
    model = choose_one(server, request.path_params["name"], request.path_params.get("version", ""))
    return json_response(ModelReady(name=model.checkpoint.name, ready=True))


async def model_metadata(request: Request, server: Server) -> Response:
    """`GET /v2/models/NAME`: a model's versions, and the names, types and shapes of its tensors."""
    name, version = request.path_params["name"], request.path_params.get("version", "")
    model = choose_one(server, name, version)
    served = server.repository.current.models[name]
    if not version:
        model = served.default
    preprocess = model.backbone.preprocess
    return json_response(
        InferMetadata(
            name=name,
            versions=[str(one) for one in sorted(served.versions)],
            platform="graft_checkpoint",
            inputs=[
                TensorMetadata(name="image", datatype="BYTES", shape=[-1]),
                TensorMetadata(
                    name="pixels",
                    datatype="UINT8",
                    shape=[-1, preprocess.height, preprocess.width, 3],
                ),
            ],
            outputs=[
                TensorMetadata(
                    name=output.name,
                    datatype=_DATATYPES[output.kind],
                    shape=[-1, len(model.task.label_names)] if output.is_per_label else [-1],
                )
                for output in model.task.outputs
            ],
        )
    )


async def infer(request: Request, server: Server) -> Response:
    """`POST /v2/models/NAME/infer`: classify encoded images, or crops that are pixels already."""
    server.check_room()
    with server.memory_budget.reserve() as reservation:
        body = await read_body(request, server.settings, reservation)
        text, binary = _split(body, request.headers.get(_HEADER_LENGTH))
        asked = parse_json(
            text, InferRequest, example=_EXAMPLE, max_keys=_MAX_KEYS, max_values=_MAX_VALUES
        )
        wanted = _read_outputs(asked)
        (tensor,) = asked.inputs
        elements = _read_elements(tensor, binary)
        _check_shape(tensor.shape)
        check_num_images(tensor.shape[0], server)
        model = choose_one(
            server, request.path_params["name"], request.path_params.get("version", "")
        )
        wanted = _choose_outputs(wanted, model.task, is_binary=_is_binary(asked))
        images = (
            _read_images(tensor, elements)
            if tensor.name == "image"
            else _read_pixels(tensor, elements, model.backbone.preprocess)
        )
        (answer,) = await server.classify(request, [model], images)
    scores = read_scores(answer, lambda index: f"{tensor.name}[{index}]")
    return _respond(asked.id, model, wanted, scores)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON of a request and the binary data after it."""
    if header_length is None:
        return body, memoryview(b"")
    if not (
        header_length.isascii()
        and header_length.isdigit()
        and len(header_length) < 16
        and int(header_length) <= len(body)
    ):
        raise RequestError(
            "bad_request",
            f"{_HEADER_LENGTH}: {header_length[:20]} is not the length of the JSON in a body of "
            f"{len(body)} bytes",
        )
    return body[: int(header_length)], memoryview(body)[int(header_length) :]


def _read_outputs(asked: InferRequest) -> list[Wanted]:
    """The outputs that the request names, perhaps none."""
    default = _is_binary(asked)
    if not asked.outputs:
        return []
    if len({output.name for output in asked.outputs}) < len(asked.outputs):
        raise RequestError("bad_request", "outputs: one is wanted twice; name each once")
    return [_read_output(output, default) for output in asked.outputs]


def _choose_outputs(wanted: list[Wanted], task: Task, *, is_binary: bool) -> list[Wanted]:
    """`wanted`, or all of the task's; raises RequestError for one that the task does not have."""
    names = [output.name for output in task.outputs]
    if missing := [one.name for one in wanted if one.name not in names]:
        raise RequestError(
            "bad_parameter",
            f"outputs: this model has no {missing[0]!r}; it has {', '.join(names)}",
        )
    return wanted or [Wanted(name, is_binary) for name in names]


def _check_shape(shape: list[int]) -> None:
    if not shape or min(shape) < 0:
        raise RequestError(
            "bad_request",
            f"shape {str(shape)[:100]} is none; its first size is the number of images",
        )


def _is_binary(asked: InferRequest) -> bool:
    return _flag(asked.parameters, "binary_data_output", default=False)


def _read_output(output: RequestOutput, default: bool) -> Wanted:
    _refuse_shared_memory(output.parameters)
    num_classes = output.parameters.get("classification")
    if num_classes is not None:
        if output.name != "probabilities":
            raise RequestError(
                "bad_parameter",
                f"classification is for the output 'probabilities', not {output.name!r}",
            )
        if type(num_classes) is not int or num_classes < 1:
            raise RequestError("bad_parameter", "classification is not a whole number from 1 up")
    return Wanted(
        output.name, _flag(output.parameters, "binary_data", default=default), num_classes
    )


def _read_elements(tensor: RequestInput, binary: memoryview) -> list[Any] | memoryview:
    """The tensor's elements, from wherever they are."""
    _refuse_shared_memory(tensor.parameters)
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if tensor.data is None:
            raise RequestError(
                "bad_request",
                f"inputs.0 has neither data nor the parameter binary_data_size; send {_EXAMPLE}",
            )
        size = 0
    elif tensor.data is not None:
        raise RequestError(
            "bad_request",
            "inputs.0 has both data and the parameter binary_data_size; send one of them",
        )
    if type(size) is not int or size != len(binary):
        raise RequestError(
            "bad_request",
            f"binary_data_size is {str(size)[:20]}, and {len(binary)} bytes follow the JSON, "
            f"whose length is the header {_HEADER_LENGTH}",
        )
    return tensor.data if tensor.data is not None else binary


def _read_images(tensor: RequestInput, elements: list[Any] | memoryview) -> list[bytes]:
    if tensor.datatype != "BYTES":
        raise RequestError(
            "bad_request", f"image is {tensor.datatype}; send files as BYTES, or crops as 'pixels'"
        )
    num_images = tensor.shape[0]
    if tensor.shape not in ([num_images], [num_images, 1]):
        raise RequestError(
            "bad_request",
            f"image is of shape {str(tensor.shape)[:100]}; send BYTES of shape [{num_images}]",
        )
    if isinstance(elements, memoryview):
        return _split_bytes(elements, num_images)
    texts = _flatten(tensor, elements)
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(
            "bad_request",
            "image: an element is not a text; send each file in base64, or as binary data",
        )
    return [decode_base64(text, f"image[{index}]") for index, text in enumerate(texts)]


def _split_bytes(data: memoryview, num_elements: int) -> list[bytes]:
    """Binary BYTES: before each element its length, 4 bytes little-endian."""
    elements, start = [], 0
    for _ in range(num_elements):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        elements.append(bytes(data[start + 4 : end]))
        start = end
    if start != len(data):
        raise RequestError(
            "bad_request",
            f"image: {len(data)} bytes are not {num_elements} elements, each after its length in "
            "4 bytes, little-endian",
        )
    return elements


def _read_pixels(
    tensor: RequestInput, elements: list[Any] | memoryview, preprocess: Preprocess
) -> list[Pixels]:
    """Crops `uint8 [H,W,3]`."""
    num_images = tensor.shape[0]
    shape = (num_images, preprocess.height, preprocess.width, 3)
    if tensor.datatype == "BYTES" or tuple(tensor.shape) != shape:
        raise RequestError(
            "bad_request",
            f"pixels are {tensor.datatype} of shape {str(tensor.shape)[:100]}; this model takes "
            f"UINT8 or FP32 of shape {list(shape)}, or files of any size as 'image'",
        )
    if isinstance(elements, memoryview):
        dtype = np.dtype("u1" if tensor.datatype == "UINT8" else "<f4")
        wanted = math.prod(shape) * dtype.itemsize
        if len(elements) != wanted:
            raise RequestError(
                "bad_request",
                f"pixels: {tensor.datatype} of shape {list(shape)} are {wanted} bytes, "
                f"not {len(elements)}",
            )
        values: npt.NDArray[Any] = np.frombuffer(elements, dtype)
    else:
        values = _read_numbers(tensor, elements)
    if tensor.datatype == "FP32":
        values = _check_range(values)
    return list(values.astype(np.uint8, copy=False).reshape(shape))


def _read_numbers(tensor: RequestInput, elements: list[Any]) -> npt.NDArray[Any]:
    numbers = _flatten(tensor, elements)
    allowed = {int} if tensor.datatype == "UINT8" else {int, float}
    if not set(map(type, numbers)) <= allowed:
        raise RequestError(
            "bad_request", f"pixels: an element is not a number of type {tensor.datatype}"
        )
    try:
        # NumPy raises for 256 here; a cast would make it 0.
        return np.array(numbers, np.uint8 if tensor.datatype == "UINT8" else np.float64)
    except OverflowError:
        raise RequestError(
            "bad_request", "pixels: an element is out of range; values are 0 to 255"
        ) from None


def _check_range(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """FP32 rounded and clipped to 0 to 255, for a resize may leave values a little outside.

    Raises RequestError for NaN, infinite and normalised values.
    """
    if not np.isfinite(values).all():
        raise RequestError(
            "bad_request", "pixels: an element is NaN or infinite; values are 0 to 255"
        )
    whole = np.rint(values)
    if np.abs(values).max() <= _MAX_NORMALISED and (whole != values).any():
        raise RequestError(
            "bad_request",
            "pixels: the values look normalised; send them as 0 to 255: the model subtracts its "
            "mean and divides by its std",
        )
    return np.asarray(np.clip(whole, 0, 255))


def _flatten(tensor: RequestInput, elements: list[Any]) -> list[Any]:
    """The elements in row-major order, from a flat list or one nested as the shape says."""
    rows = elements
    if rows and isinstance(rows[0], list):
        for size in tensor.shape[1:]:
            if not all(isinstance(row, list) and len(row) == size for row in rows):
                raise RequestError(
                    "bad_request",
                    f"{tensor.name}: data is not nested as the shape {tensor.shape} says",
                )
            rows = list(chain.from_iterable(rows))
    if len(rows) != math.prod(tensor.shape):
        raise RequestError(
            "bad_request",
            f"{tensor.name}: shape {tensor.shape} has {math.prod(tensor.shape)} elements, "
            f"data has {len(rows)}",
        )
    return rows


def _respond(
    request_id: str | None, model: Model, wanted: Sequence[Wanted], scores: Scores
) -> Response:
    outputs, parts = [], []
    for one in wanted:
        output, binary = _encode_output(one, _compute(one, model.task, scores))
        outputs.append(output)
        if binary is not None:
            parts.append(binary)
    checkpoint = model.checkpoint
    answer = InferResponse(
        model_name=checkpoint.name,
        model_version=str(checkpoint.version),
        id=request_id,
        outputs=outputs,
    )
    # Not pydantic's JSON, which fails on half of a surrogate pair: a request's id may hold one.
    text = json.dumps(answer.model_dump(exclude_none=True)).encode()
    if not parts:
        return Response(text, media_type="application/json")
    return Response(
        b"".join([text, *parts]),
        headers={_HEADER_LENGTH: str(len(text))},
        media_type="application/octet-stream",
    )


def _compute(wanted: Wanted, task: Task, scores: Scores) -> npt.NDArray[Any]:
    """An output's values: texts as objects, numbers or booleans."""
    if wanted.num_classes is None:
        return task.output(wanted.name, scores)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : wanted.num_classes]
    texts = [
        [f"{row[index]:.6f}:{index}:{task.label_names[index]}" for index in best]
        for row, best in zip(scores, order, strict=True)
    ]
    return np.array(texts, object)


def _encode_output(wanted: Wanted, values: npt.NDArray[Any]) -> tuple[ResponseOutput, bytes | None]:
    """The output with its elements, or with the number of the bytes that hold them."""
    output = ResponseOutput(
        name=wanted.name, datatype=_DATATYPES[values.dtype.kind], shape=list(values.shape)
    )
    if not wanted.is_binary:
        is_float = values.dtype.kind == "f"
        output.data = rounded(values.ravel()) if is_float else values.ravel().tolist()
        return output, None
    binary = _to_bytes(values)
    output.parameters = {"binary_data_size": len(binary)}
    return output, binary


def _to_bytes(values: npt.NDArray[Any]) -> bytes:
    if values.dtype.kind == "O":
        return _join_bytes(values.ravel().tolist())
    return (values.astype("<f4") if values.dtype.kind == "f" else values).tobytes()


def _join_bytes(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(part for one in encoded for part in (len(one).to_bytes(4, "little"), one))


def _flag(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError("bad_parameter", f"{name} is not true or false")
    return value


def _refuse_shared_memory(parameters: dict[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise RequestError(
            "bad_parameter",
            "this server has no shared memory; send the data itself, as binary data where it is "
            "large",
        )
