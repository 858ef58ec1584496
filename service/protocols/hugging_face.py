"""Hugging Face's image classification API: `POST /hf/NAME`, an image in, labels and scores out, best first.

    InferenceClient().image_classification("photo.jpg", model="http://localhost:3000/hf/photos", top_k=3)

https://huggingface.co/docs/inference-providers/tasks/image-classification. The body is the image itself, or JSON with the image in
base64; which of the two is seen by its first byte, whatever the content type says.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.server import Server
from service.protocols.graft import DEFAULT_TOP_K
from service.protocols.predictions import rank
from service.protocols.shared import (
    check_uncompressed,
    choose_one,
    decode_base64,
    parse_json,
    read_scores,
)
from service.web.responses import json_response
from service.web.uploads import read_body

_EXAMPLE = (
    '{"inputs": "<an image file in base64>", "parameters": {"top_k": 5}}, or the image itself'
)
_MAX_KEYS = 100


class ImageClassificationParameters(BaseModel):
    """How many labels; the scores are calibrated probabilities, so there is no other function to apply than the model's own."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    function_to_apply: Literal["softmax", "sigmoid"] | None = Field(
        default=None, description="sigmoid for a multi-label model, softmax for others."
    )


class ImageClassificationRequest(BaseModel):
    """An image and what is wanted of it."""

    inputs: str = Field(description="An image file in base64.")
    parameters: ImageClassificationParameters | None = None


async def classify_image(request: Request, server: Server) -> Response:
    """`POST /hf/NAME`: labels and scores of one image, best first."""
    server.check_room()
    check_uncompressed(request)
    parameters = ImageClassificationParameters()
    with server.buffered.hold() as hold:
        image = await read_body(request, server.settings, hold)
        if not image:
            raise RequestError("no_image", f"the body is empty; send {_EXAMPLE}")
        # No image format starts so.
        if image.lstrip()[:1] == b"{":
            asked = parse_json(
                image,
                ImageClassificationRequest,
                example=_EXAMPLE,
                max_keys=_MAX_KEYS,
                max_values=_MAX_KEYS,
            )
            parameters = asked.parameters or parameters
            image = decode_base64(asked.inputs, "inputs")
        model = choose_one(
            server, request.path_params["name"], request.path_params.get("version", "")
        )
        function = "softmax" if model.checkpoint.thresholds is None else "sigmoid"
        if parameters.function_to_apply not in (None, function):
            asked_for = parameters.function_to_apply
            raise RequestError(
                "bad_parameter",
                f"function_to_apply={asked_for}: this model's is {function!r}; leave it out",
            )
        (answer,) = await server.classify(request, [model], [image])
    (scores,) = read_scores(answer, lambda index: "the image")
    ranked = rank(scores, model.checkpoint.label_names, parameters.top_k or DEFAULT_TOP_K)
    return json_response([one.model_dump() for one in ranked])
