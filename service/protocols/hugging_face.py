"""Hugging Face's image classification API: `POST /hf/NAME`.

    InferenceClient().image_classification(
        "photo.jpg", model="http://localhost:3000/hf/photos", top_k=3
    )

https://huggingface.co/docs/inference-providers/tasks/image-classification. The body is the image
itself, or JSON with the image in base64: the first byte decides, not the content type.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.inference.server import Server
from service.protocols.shared import (
    choose_one,
    decode_base64,
    parse_json,
    read_scores,
)
from service.tasks.task import DEFAULT_TOP_K, Activation, rank
from service.web.responses import json_response
from service.web.uploads import read_body

_EXAMPLE = (
    '{"inputs": "<an image file in base64>", "parameters": {"top_k": 5}}, or the image itself'
)
_MAX_KEYS = 100


class ImageClassificationParameters(BaseModel):
    """How many labels. The scores are calibrated, by the model's own function and no other."""

    model_config = ConfigDict(extra="forbid")

    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    function_to_apply: Activation | None = Field(
        default=None, description="sigmoid for a multi-label model, softmax for others."
    )


class ImageClassificationRequest(BaseModel):
    """An image and its parameters."""

    inputs: str = Field(description="An image file in base64, or as a data: URL.")
    parameters: ImageClassificationParameters | None = None


async def classify_image(request: Request, server: Server) -> Response:
    """`POST /hf/NAME`: labels and scores of one image, best first."""
    server.check_room()
    parameters = ImageClassificationParameters()
    with server.memory_budget.reserve() as reservation:
        image = await read_body(request, server.settings, reservation)
        if not image:
            raise RequestError("no_image", f"the body is empty; send {_EXAMPLE}")
        # No image format starts with a brace.
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
        if parameters.function_to_apply not in (None, model.task.activation):
            raise RequestError(
                "bad_parameter",
                f"function_to_apply={parameters.function_to_apply}: this model's is "
                f"{model.task.activation!r}; leave it out",
            )
        (answer,) = await server.classify(request, [model], [image])
    (scores,) = read_scores(answer, lambda index: "the image")
    ranked = rank(scores, model.task.label_names, parameters.top_k or DEFAULT_TOP_K)
    return json_response([one.model_dump() for one in ranked])
