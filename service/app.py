"""The BentoML service `Graft`: its table of routes, and its configuration of BentoML.

    bentoml serve     # in the folder of bentofile.yaml; CHECKPOINTS=DIR for another repository
    curl -F images=@photo.jpg localhost:3000/predict

BentoML gives the process, the configuration, clients, spans and the Bento. Requests are answered by
handlers of our own, in a middleware, because BentoML's reads a body without a limit, fetches a text
in a file field as a URL, decodes on the event loop, and has errors of many shapes (all of 1.4.39).
`Graft.predict` declares the same interface for the schema and for BentoML's clients.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import bentoml
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from models.errors import GraftError
from service import lifeline
from service.inference.server import Server
from service.openapi import DESCRIPTION, describe
from service.protocols import open_inference, tf_serving
from service.protocols.admin import load_version, patch_rollout, unload_version
from service.protocols.graft import list_models, predict
from service.protocols.health import livez, prometheus, readyz, status
from service.protocols.hugging_face import classify_image
from service.protocols.schemas import PredictResponse
from service.settings import load_settings
from service.tasks.task import DEFAULT_TOP_K
from service.web.connection import use_connections
from service.web.responses import plain_error
from service.web.route import Handler, Route
from service.web.routes import Routes
from service.web.uploads import OPTION_FIELDS

_PAGE = Path(__file__).with_name("page.html")


async def page(request: Request, server: Server) -> Response:
    """`GET /`: a page to try the models on."""
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"))


async def docs(request: Request, server: Server) -> Response:
    """`GET /docs.json`: the OpenAPI description."""
    return JSONResponse(_describe(server.settings.api_token is not None))


@cache
def _describe(needs_token: bool) -> dict[str, Any]:
    return describe(
        cast(bentoml.Service[Any], Graft).openapi_spec.asdict(), ROUTES, needs_token=needs_token
    )


def _for_each(
    addresses: Sequence[str], method: Literal["GET", "POST"], suffix: str, handler: Handler
) -> list[Route]:
    """One route of another protocol at each of the addresses that a model has there."""
    return [Route(method, one + suffix, handler, error_body=plain_error) for one in addresses]


_VERSION = "/v1/models/{name}/versions/{version}"
_TF_SERVING = (
    "/v1/models/{name}",
    _VERSION,
    "/v1/models/{name}/labels/{label}",
)
_OPEN_INFERENCE = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
_HUGGING_FACE = ("/hf/{name}", "/hf/{name}/versions/{version}")

ROUTES = (
    Route("GET", "/", page, needs="nothing"),
    Route("POST", "/predict", predict, query=OPTION_FIELDS),
    Route("GET", "/v1/models", list_models, query=()),
    Route("GET", "/v1/status", status, query=()),
    Route("GET", "/docs.json", docs, needs="nothing"),
    Route("GET", "/livez", livez, needs="nothing"),
    Route("GET", "/readyz", readyz, needs="nothing"),
    Route("GET", "/metrics", prometheus, needs="nothing"),
    Route("POST", _VERSION + ":load", load_version, needs="admin_token", query=()),
    Route("POST", _VERSION + ":unload", unload_version, needs="admin_token", query=()),
    Route("PATCH", "/v1/models/{name}/rollout", patch_rollout, needs="admin_token", query=()),
    *_for_each(_TF_SERVING, "POST", ":predict", tf_serving.predict),
    *_for_each(_TF_SERVING, "GET", "", tf_serving.model_status),
    *_for_each(_TF_SERVING, "GET", "/metadata", tf_serving.model_metadata),
    Route("GET", "/v2", open_inference.server_metadata, error_body=plain_error),
    Route("GET", "/v2/health/live", open_inference.live, needs="nothing", error_body=plain_error),
    Route("GET", "/v2/health/ready", open_inference.ready, needs="nothing", error_body=plain_error),
    *_for_each(_OPEN_INFERENCE, "GET", "", open_inference.model_metadata),
    *_for_each(_OPEN_INFERENCE, "GET", "/ready", open_inference.model_ready),
    *_for_each(_OPEN_INFERENCE, "POST", "/infer", open_inference.infer),
    *_for_each(_HUGGING_FACE, "POST", "", classify_image),
)

try:
    _SETTINGS = load_settings()
    SERVER = Server(_SETTINGS)
except GraftError as error:
    # BentoML would show a traceback of its own import.
    sys.exit(f"error: {error}")

use_connections(_SETTINGS.header_seconds)


@bentoml.service(
    name="Graft",
    # One process per device: it owns the engines, and uses every core by itself.
    workers=1,
    description=DESCRIPTION,
    # BentoML's own timeout answers in another shape, so it is longer than ours. BentoML keeps
    # a timer per request until the timeout expires, so it is only slightly longer.
    traffic={"timeout": _SETTINGS.body_seconds + _SETTINGS.deadline_seconds + 10},
    # Spans that go nowhere are 250 of the 300 µs that a request spends in BentoML's middlewares.
    tracing={} if _SETTINGS.tracing else {"excluded_urls": ".*"},
    # Our metrics have bounded labels, and our log has each request's model, images and time.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Graft:
    """Image classifiers that share their backbone."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def deploy() -> None:
        lifeline.watch_worker()

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        await SERVER.start()
        lifeline.follow_parent()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        await SERVER.stop()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(
        self,
        images: Annotated[list[Path], Field(description="One or more image files.")],
        model: Annotated[
            str, Field(description="The model's name, or all; needed where several are served.")
        ] = "",
        version: Annotated[
            str,
            Field(
                description="A version's number, a label, or latest; "
                "by default what the rollout says."
            ),
        ] = "",
        top_k: Annotated[
            int,
            Field(
                ge=1,
                description="How many labels to list per image; "
                "left out, a multi-label model lists all.",
            ),
        ] = DEFAULT_TOP_K,
    ) -> PredictResponse:
        """Classify images. The answer has one entry per image, in order.

        An image that cannot be read has an error in its place.
        """
        raise AssertionError("the Routes middleware answers /predict")


cast(bentoml.Service[Any], Graft).add_asgi_middleware(Routes, server=SERVER, routes=ROUTES)
