"""The BentoML service `Graft`: its routes, its limits, and its life from start to SIGTERM.

    bentoml serve                       # from the folder of bentofile.yaml; CHECKPOINTS=DIR for another repository
    curl -F images=@photo.jpg localhost:3000/predict

BentoML gives the process, the configuration, metrics, OpenAPI, clients and the Bento. Requests are answered by handlers of our
own, in a middleware: BentoML's path reads a body without a limit, fetches a text in a file field as a URL, decodes on the event
loop, and its errors have many shapes (all of 1.4.39). `Graft.predict` declares the same interface for schema and clients.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar, cast

import bentoml
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import GraftError
from models.preprocess import ImageError, ImageTooLargeError
from service.errors import RequestError
from service.openapi import describe
from service.predictor import Predictor
from service.repository import Model, Repository, load_repository
from service.schemas import ErrorDetail, ErrorResponse, ModelInfo, ModelsResponse, Prediction, PredictResponse, RefusedModel
from service.settings import Settings, load_settings
from service.uploads import Buffered, NamedImage, Upload, read_upload

logger = logging.getLogger("bentoml.graft")

STATUS_BY_CODE = {
    "bad_parameter": 400,
    "broken_multipart": 400,
    "model_required": 400,
    "no_image": 400,
    "unknown_field": 400,
    "unreadable_image": 400,
    "no_such_model": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "body_too_large": 413,
    "image_too_large": 413,
    "too_many_images": 413,
    "unsupported_content_type": 415,
    "overloaded": 429,
    "internal": 500,
    "engine_failed": 500,
    "no_model": 503,
    "not_ready": 503,
    "shutting_down": 503,
    "deadline_exceeded": 504,
}
DEFAULT_TOP_K = 5
# A batch takes milliseconds; one that is in the engine for so long will not come back, and the process must be replaced.
_WEDGED_SECONDS = 60.0
# What BentoML answers itself. Its start page is not among them: it loads a third party's script.
_BENTOML_PATHS = ("/healthz", "/metrics", "/schema.json")
_PAGE = Path(__file__).with_name("page.html")

T = TypeVar("T")


class Server:
    """What this process serves, and whether it may: one per process, shared by the service's hooks and its routes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.repository: Repository | None = None
        self.predictor = Predictor(decode_threads=settings.decode_threads, max_pixels=settings.max_pixels)
        self.buffered = Buffered(settings.max_buffered_bytes)
        self.is_draining = False
        self._load_error = ""
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load in the background: /livez answers meanwhile, and /readyz says what is missing."""
        self._drain_on_sigterm()
        self._loading = asyncio.create_task(self._load())

    async def stop(self) -> None:
        """Finish what is in, then let go of engines and threads."""
        if self._loading is not None:
            await self._loading
        if self.repository is not None:
            await self.repository.close()
        self.predictor.close()

    def check_ready(self) -> Repository:
        """The repository, with at least one model in it; raises RequestError with what to do otherwise."""
        if self._load_error:
            raise RequestError("no_model", self._load_error)
        if self.repository is None:
            raise RequestError("not_ready", "the models are being loaded; try again in 1 s", retry_after_seconds=1)
        if not self.repository.models:
            raise RequestError("no_model", self._how_to_get_a_model(self.repository))
        return self.repository

    def check_alive(self) -> None:
        """Raises RequestError where an engine has stopped answering, so that an orchestrator replaces the process."""
        backbones = self.repository.backbones if self.repository is not None else []
        if any(backbone.batcher.stalled_seconds() > _WEDGED_SECONDS for backbone in backbones):
            raise RequestError("not_ready", "the engine does not answer; restart this server")

    async def _load(self) -> None:
        try:
            self.repository = await asyncio.to_thread(load_repository, self.settings)
        except GraftError as error:
            self._load_error = str(error)
            logger.error("%s", error)
        # The process stays up to say that it is not ready; the cause is in the log.
        except Exception:
            self._load_error = "the models could not be loaded; the server's log says why"
            logger.exception("the models could not be loaded from %s", self.settings.checkpoints)
        else:
            if not self.repository.models:
                logger.warning("%s (CHECKPOINTS is %s)", self._how_to_get_a_model(self.repository), self.settings.checkpoints)

    def _how_to_get_a_model(self, repository: Repository) -> str:
        what = "no checkpoint could be loaded, GET /v1/models says why" if repository.refused else "there is no checkpoint yet"
        return f"{what}: make one with `make run`, or set CHECKPOINTS to a folder that has <name>/<version>/, and restart"

    def _drain_on_sigterm(self) -> None:
        """On SIGTERM turn /readyz first, and let uvicorn stop accepting when load balancers had time to see it."""
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        stop = signal.getsignal(signal.SIGTERM)

        def drain(number: int, frame: FrameType | None) -> None:
            if self.is_draining or not callable(stop):
                return
            self.is_draining = True
            # A connection that never ends would hold uvicorn for ever.
            limit = threading.Timer(self.settings.shutdown_seconds, os._exit, (0,))
            limit.daemon = True
            limit.start()
            loop.call_soon_threadsafe(loop.call_later, self.settings.drain_seconds, stop, number, frame)

        signal.signal(signal.SIGTERM, drain)


async def predict(request: Request, server: Server) -> Response:
    """`POST /predict`: images in, predictions out."""
    repository = server.check_ready()
    with server.buffered.hold() as hold:
        upload = await read_upload(request, server.settings, hold)
        model = _choose_model(repository, upload.options.get("model", ""))
        top_k = _parse_top_k(upload.options.get("top_k", ""))
        deadline = time.monotonic() + server.settings.deadline_seconds
        data = [image.data for image in upload.images]
        work = server.predictor.predict(model, data, top_k=top_k, deadline=deadline)
        results = await _unless_disconnected(request, work)
    return _json(_predict_response(model, upload, results))


async def list_models(request: Request, server: Server) -> Response:
    """`GET /v1/models`: what is served, on what, and what was refused and why."""
    repository = server.repository
    if repository is None:
        server.check_ready()
        raise AssertionError("no repository, and no reason why")
    models = [_model_info(model) for model in repository.models.values()]
    refused = [RefusedModel(name=one.name, version=one.version, reason=one.reason) for one in repository.refused]
    return _json(ModelsResponse(models=models, refused=refused))


async def livez(request: Request, server: Server) -> Response:
    server.check_alive()
    return Response("\n", media_type="text/plain")


async def readyz(request: Request, server: Server) -> Response:
    if server.is_draining:
        raise RequestError("shutting_down", "this server is shutting down; send requests to another")
    server.check_ready()
    server.check_alive()
    return Response("\n", media_type="text/plain")


async def page(request: Request, server: Server) -> Response:
    return HTMLResponse(_PAGE.read_text())


async def docs(request: Request, server: Server) -> Response:
    """`GET /docs.json`: the OpenAPI description."""
    return JSONResponse(describe(cast(bentoml.Service[Any], Graft).openapi_spec.asdict(), STATUS_BY_CODE.values()))


ROUTES: dict[str, tuple[str, Callable[[Request, Server], Awaitable[Response]]]] = {
    "/": ("GET", page),
    "/predict": ("POST", predict),
    "/v1/models": ("GET", list_models),
    "/docs.json": ("GET", docs),
    "/livez": ("GET", livez),
    "/readyz": ("GET", readyz),
}


class Routes:
    """ASGI middleware that answers ROUTES itself, hands BentoML its own paths, and gives every error the one shape."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _BENTOML_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            # Nobody is there to read it; the status is for metrics and logs.
            response = Response(status_code=499)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._route(request)
        except RequestError as error:
            return _error(error)
        except ClientDisconnect:
            raise
        # The last resort: the client learns nothing of the inside, the log everything.
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            return _error(RequestError("internal", "something went wrong inside the server; its log has the details"))

    async def _route(self, request: Request) -> Response:
        if request.url.path not in ROUTES:
            raise RequestError("not_found", f"there is nothing here; the paths are {', '.join(ROUTES)} and /metrics")
        method, handler = ROUTES[request.url.path]
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            raise RequestError("method_not_allowed", f"{request.url.path} takes {method}, not {request.method}")
        return await handler(request, self._server)


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, cancelled as soon as the client hangs up: nobody would read the answer. Raises ClientDisconnect then."""
    working = asyncio.current_task()
    assert working is not None

    async def watch() -> None:
        # The body has been read, so the next message is the end of the connection.
        await request.receive()
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not watching.done():
            raise
        working.uncancel()
        raise ClientDisconnect from None
    finally:
        watching.cancel()


def _choose_model(repository: Repository, name: str) -> Model:
    names = ", ".join(sorted(repository.models))
    if name:
        model = repository.models.get(name)
        if model is None:
            raise RequestError("no_such_model", f"there is no model {name[:100]!r}; there is {names}")
        return model
    if len(repository.models) > 1:
        raise RequestError("model_required", f"several models are served; say which in 'model': {names}")
    return next(iter(repository.models.values()))


def _parse_top_k(text: str) -> int:
    if not text:
        return DEFAULT_TOP_K
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:10]) <= 1_000_000):
        raise RequestError("bad_parameter", f"top_k={text[:20]!r} is not a whole number from 1 up")
    return int(text)


def _predict_response(model: Model, upload: Upload, results: list[Prediction | ImageError]) -> PredictResponse:
    """One entry per image; raises RequestError where none of them could be read."""
    entries = [_entry(image, result) for image, result in zip(upload.images, results, strict=True)]
    failed = [entry for entry in entries if isinstance(entry, ErrorResponse)]
    if len(failed) == len(entries):
        prefix = "" if len(failed) == 1 else f"none of the {len(failed)} images could be read; the first: "
        raise RequestError(failed[0].error.code, prefix + failed[0].error.message)
    checkpoint = model.checkpoint
    return PredictResponse(model=checkpoint.name, version=checkpoint.version, predictions=entries)


def _entry(image: NamedImage, result: Prediction | ImageError) -> Prediction | ErrorResponse:
    if isinstance(result, Prediction):
        return result
    code = "image_too_large" if isinstance(result, ImageTooLargeError) else "unreadable_image"
    return ErrorResponse(error=ErrorDetail(code=code, message=f"{image.name}: {result}"))


def _model_info(model: Model) -> ModelInfo:
    checkpoint, info = model.checkpoint, model.info
    return ModelInfo(
        name=checkpoint.name,
        version=checkpoint.version,
        labels=list(checkpoint.label_names),
        architecture=checkpoint.architecture,
        fingerprint=checkpoint.fingerprint,
        metrics=dict(checkpoint.metrics),
        device=info.device,
        engine=info.engine,
        precision=info.precision,
        batch_size=info.batch_size,
        num_streams=info.num_streams,
        images_per_second=round(info.images_per_second, 1),
    )


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")


def _error(error: RequestError) -> Response:
    response = _json(ErrorResponse(error=ErrorDetail(code=error.code, message=error.message)), STATUS_BY_CODE[error.code])
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    return response


_SETTINGS = load_settings()
SERVER = Server(_SETTINGS)


@bentoml.service(
    name="Graft",
    # One process per device: it has the engines, and fills every core by itself.
    workers=1,
    description="Image classifiers that share their backbone: send images, get labels with calibrated scores.",
    # BentoML's own limit answers in another shape; ours are shorter, and this one never comes first.
    traffic={"timeout": 2 * (_SETTINGS.body_seconds + _SETTINGS.deadline_seconds)},
    # Measured: with nothing to send spans to, they are 250 of 300 µs that BentoML's middlewares cost a request.
    tracing={} if _SETTINGS.tracing else {"excluded_urls": ".*"},
)
class Graft:
    """Image classifiers that share their backbone."""

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        await SERVER.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        await SERVER.stop()

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(
        self,
        images: Annotated[list[Path], Field(description="One or more image files.")],
        model: Annotated[str, Field(description="The model's name; needed where several are served.")] = "",
        top_k: Annotated[int, Field(ge=1, description="How many labels to list per image.")] = DEFAULT_TOP_K,
    ) -> PredictResponse:
        """Classify images. The answer has one entry per image, in order; one that cannot be read has an error in its place."""
        raise AssertionError("the Routes middleware answers /predict")


cast(bentoml.Service[Any], Graft).add_asgi_middleware(Routes, server=SERVER)
