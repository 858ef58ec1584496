"""What this process serves and whether it is healthy: one `Server`, shared by hooks and routes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from models.checkpoint import ALL_MODELS
from models.errors import GraftError
from models.images import ImageError, Pixels
from service import metrics
from service.errors import RequestError
from service.inference.memory_budget import MemoryBudget
from service.inference.predictor import Answer, Predictor
from service.inference.repository import Model, Repository, Snapshot, explain_empty
from service.inference.shadows import Shadows, shadows_on_same_backbone
from service.settings import Settings

logger = logging.getLogger("bentoml.graft")

# A batch takes milliseconds: one that is in the engine for so long will not end.
_STALLED_SECONDS = 60.0
# Between two attempts to load, where GRAFT_POLL_SECONDS=0 has the repository read only once.
_RETRY_SECONDS = 1.0
# How long the event loop may keep Python's lock from other threads; under overload Python's default
# of 5 ms starved the engine.
_SWITCH_SECONDS = 0.0005
# Requests leave hardly any cycles behind; Python's default of 700 objects is two requests.
_OBJECTS_BETWEEN_COLLECTIONS = 20_000
# Most requests are answered sooner, without the cost of a task that watches their connection.
_WATCH_AFTER_SECONDS = 0.1

T = TypeVar("T")


class Server:
    """The repository and the predictor, from the start of the process to SIGTERM."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.repository = Repository(settings, on_engine_death=_terminate)
        self.predictor = Predictor(
            cached_images=settings.cached_images,
            is_traced=settings.tracing,
        )
        self.memory_budget = MemoryBudget(settings.max_buffered_bytes)
        self.is_draining = False
        self.started = time.time()
        self.is_loaded = False
        self._load_error = ""
        self._last_error = ""
        self._watching: asyncio.Task[None] | None = None
        self._shadows = Shadows(self.predictor, settings.deadline_seconds)

    async def start(self) -> None:
        """Load in the background; meanwhile /livez answers 200 and /readyz says what is missing."""
        self._drain_on_sigterm()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._watching = asyncio.create_task(self._load_and_watch())

    async def stop(self) -> None:
        """Finish the admitted requests, then close the engines."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self._shadows.finish()
        await self.repository.close()

    def check_ready(self) -> Snapshot:
        """What is served, at least one model; raises RequestError with the way out otherwise."""
        if self._load_error:
            raise RequestError("no_model", self._load_error)
        if not self.is_loaded:
            raise RequestError(
                "not_ready", "the models are being loaded; try again in 1 s", retry_after_seconds=1
            )
        if not self.repository.current.models:
            raise RequestError("no_model", self._no_model_message())
        return self.repository.current

    def check_healthy(self) -> None:
        """Raises RequestError with the reason where this process should get no requests."""
        if self.is_draining:
            raise RequestError(
                "shutting_down", "this server is shutting down; send requests to another"
            )
        self.check_ready()
        self.check_alive()

    def check_room(self) -> None:
        """Raises RequestError where nothing is served, or no queue has room for one image.

        Called before a body is read: under overload, reading what is then refused would take time
        from the requests that are answered.
        """
        deadline = time.monotonic() + self.settings.deadline_seconds
        *others, last = (backbone.batcher for backbone in self.check_ready().backbones)
        for batcher in others:
            with suppress(RequestError):
                batcher.check(1, deadline)
                return
        last.check(1, deadline)

    def check_alive(self) -> None:
        """Raises RequestError where an engine has stopped: the process must be replaced."""
        if self.is_stalled():
            raise RequestError("not_ready", "the engine does not answer; restart this server")

    def is_stalled(self) -> bool:
        backbones = self.repository.current.backbones
        return any(
            backbone.engine.is_dead or backbone.batcher.stalled_seconds() > _STALLED_SECONDS
            for backbone in backbones
        )

    def choose(self, name: str, version: str = "") -> list[Model]:
        """The model of this name and version; for `all`, every model's default.

        No name stands for the only model. Raises RequestError where there is no such model, or
        several and none is named.
        """
        models = self.check_ready().models
        if name == ALL_MODELS:
            if version:
                raise RequestError(
                    "bad_parameter",
                    "model=all takes no version: each model answers with its default",
                )
            return [served.choose() for served in models.values()]
        if not name and len(models) == 1:
            (name,) = models
        if name in models:
            return [models[name].choose(version)]
        names = ", ".join(sorted(models)[:50])
        if name:
            raise RequestError(
                "no_such_model",
                f"no model {name[:100]!r} is served; available models: {names or 'none'}",
            )
        raise RequestError(
            "model_required", f"several models are served; say which in 'model' (or 'all'): {names}"
        )

    async def classify(
        self, request: Request, models: Sequence[Model], images: Sequence[bytes | Pixels]
    ) -> list[Answer]:
        """One answer per model, before the deadline; cancelled as soon as the client hangs up.

        Raises RequestError for the whole request, and ClientDisconnect. Images that cannot be read
        are in the answers.
        """
        start = time.monotonic()
        deadline = start + self.settings.deadline_seconds
        snapshot = self.repository.current
        asked = [*models, *shadows_on_same_backbone(snapshot, models)]
        request.state.log.update(
            model=[model.checkpoint.name for model in models],
            version=[model.checkpoint.version for model in models],
            images=len(images),
        )
        answers = await _unless_disconnected(
            request, self.predictor.predict(asked, images, deadline=deadline)
        )
        seconds = time.monotonic() - start
        request.state.log["predict_ms"] = round(1000 * seconds, 1)
        sent, shadow_answers = answers[: len(models)], answers[len(models) :]
        for answer in sent:
            _count_images(answer, seconds)
        self._shadows.compare(snapshot, sent, shadow_answers, images)
        return sent

    async def _load_and_watch(self) -> None:
        while not await self._load():
            await asyncio.sleep(self.settings.poll_seconds or _RETRY_SECONDS)
        _spare_garbage_collection()
        if not self.repository.current.models:
            root = self.settings.checkpoints.absolute()
            found = await asyncio.to_thread(explain_empty, root)
            logger.warning("%s (%s)", self._no_model_message(), found or f"CHECKPOINTS is {root}")
        if self.settings.poll_seconds:
            await self.repository.watch()

    async def _load(self) -> bool:
        """Whether the repository could be read; the process stays up and says where it could not.

        What is in the way may go: a volume is mounted, rights are given. An error is logged once.
        """
        try:
            await self.repository.refresh()
        except Exception as error:
            is_told = isinstance(error, GraftError)
            self._load_error = (
                str(error)
                if is_told
                else "the models could not be loaded; the server's log says why"
            )
            if repr(error) != self._last_error:
                logger.error("%s", self._load_error, exc_info=None if is_told else error)
            self._last_error = repr(error)
            return False
        self._load_error, self.is_loaded = "", True
        return True

    def _no_model_message(self) -> str:
        what = "there is no checkpoint yet"
        if self.repository.current.refused:
            what = "no checkpoint could be loaded, GET /v1/models says why"
        then = "it is served as soon as it is there" if self.settings.poll_seconds else "restart"
        return (
            f"{what}: make one with `make run`, or put one at <name>/<version>/ in the folder "
            f"CHECKPOINTS; {then}"
        )

    def _drain_on_sigterm(self) -> None:
        """On SIGTERM /readyz fails at once; uvicorn stops accepting once load balancers saw it."""
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        stop = signal.getsignal(signal.SIGTERM)

        def drain(number: int, frame: FrameType | None) -> None:
            if self.is_draining or not callable(stop):
                return
            self.is_draining = True
            # uvicorn would wait for a connection that never ends.
            limit = threading.Timer(self.settings.shutdown_seconds, os._exit, (0,))
            limit.daemon = True
            limit.start()
            loop.call_soon_threadsafe(
                loop.call_later, self.settings.drain_seconds, stop, number, frame
            )

        signal.signal(signal.SIGTERM, drain)


def _spare_garbage_collection() -> None:
    """Exempt what was loaded, which stays: collecting took a fifth of the event loop's time under
    overload."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def _count_images(answer: Answer, seconds: float) -> None:
    labels = (answer.model.checkpoint.name, str(answer.model.checkpoint.version))
    num_unreadable = sum(isinstance(result, ImageError) for result in answer.results)
    metrics.note(metrics.PREDICT_SECONDS, labels, seconds)
    metrics.note(metrics.IMAGES, (*labels, "answered"), len(answer.results) - num_unreadable)
    if num_unreadable:
        metrics.note(metrics.IMAGES, (*labels, "unreadable"), num_unreadable)


def _terminate() -> None:
    """Without an engine: answer what is admitted and end, so that the parent starts another."""
    os.kill(os.getpid(), signal.SIGTERM)


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, which is cancelled when the client hangs up; raises ClientDisconnect then."""
    working = asyncio.current_task()
    assert working is not None
    watching: asyncio.Task[None] | None = None

    async def watch() -> None:
        # The body has been read: the next message is the end of the connection.
        await request.receive()
        working.cancel()

    def start_to_watch() -> None:
        nonlocal watching
        watching = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_SECONDS, start_to_watch)
    try:
        return await work
    except asyncio.CancelledError:
        if watching is None or not watching.done():
            raise
        working.uncancel()
        raise ClientDisconnect from None
    finally:
        timer.cancel()
        if watching is not None:
            watching.cancel()
