"""What this process serves, and whether it may: one `Server` per process, shared by the service's hooks and its routes."""

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

from models.errors import GraftError
from models.preprocess import ImageError, Pixels
from service import metrics
from service.errors import RequestError
from service.inference.memory_budget import Buffered
from service.inference.predictor import Answer, Predictor, named_labels
from service.inference.repository import Model, Repository, Snapshot
from service.settings import Settings

logger = logging.getLogger("bentoml.graft")

# A batch takes milliseconds; one that is in the engine for so long will not come back, and the process must be replaced.
_WEDGED_SECONDS = 60.0
# Requests that a shadow version is asked about at once; what comes meanwhile is not put to it.
_MAX_SHADOWS = 16
ALL_MODELS = "all"
# How long the event loop may keep Python's lock from the threads that decode: with Python's own 5 ms a storm starves the engine.
_SWITCH_SECONDS = 0.0005
# Requests leave hardly any cycles behind; Python's own 700 are those of two requests.
_OBJECTS_BETWEEN_COLLECTIONS = 20_000
# What is answered sooner is not worth the task that watches whether its client is still there.
_WATCH_AFTER_SECONDS = 0.1

T = TypeVar("T")


class Server:
    """The repository, the predictor, and this process's life from start to SIGTERM."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.repository = Repository(settings, on_engine_death=self._end)
        self.predictor = Predictor(
            cached_images=settings.cached_images,
            is_traced=settings.tracing,
        )
        self.buffered = Buffered(settings.max_buffered_bytes)
        self.is_draining = False
        self.started = time.time()
        self.is_loaded = False
        self._load_error = ""
        self._watching: asyncio.Task[None] | None = None
        self._shadows: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load in the background: /livez answers meanwhile, and /readyz says what is missing."""
        self._drain_on_sigterm()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._watching = asyncio.create_task(self._load_and_watch())

    async def stop(self) -> None:
        """Finish what is in, then let go of engines and threads."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await asyncio.gather(*self._shadows)
        await self.repository.close()

    def check_ready(self) -> Snapshot:
        """What is served, at least one model; raises RequestError with what to do otherwise."""
        if self._load_error:
            raise RequestError("no_model", self._load_error)
        if not self.is_loaded:
            raise RequestError(
                "not_ready", "the models are being loaded; try again in 1 s", retry_after_seconds=1
            )
        if not self.repository.current.models:
            raise RequestError("no_model", self._how_to_get_a_model())
        return self.repository.current

    def check_healthy(self) -> None:
        """Raises RequestError with the reason where this process should be sent no requests."""
        if self.is_draining:
            raise RequestError(
                "shutting_down", "this server is shutting down; send requests to another"
            )
        self.check_ready()
        self.check_alive()

    def check_room(self) -> None:
        """Raises RequestError where nothing is served, or every queue is too long for one image more: to be asked before a body is
        read, for in a storm reading and parsing what is then refused would take the time of what is answered."""
        deadline = time.monotonic() + self.settings.deadline_seconds
        *others, last = (backbone.batcher for backbone in self.check_ready().backbones)
        for batcher in others:
            with suppress(RequestError):
                batcher.check(1, deadline)
                return
        last.check(1, deadline)

    def check_alive(self) -> None:
        """Raises RequestError where an engine has stopped answering, so that an orchestrator replaces the process."""
        if self.is_wedged():
            raise RequestError("not_ready", "the engine does not answer; restart this server")

    def is_wedged(self) -> bool:
        backbones = self.repository.current.backbones
        return any(
            one.engine.is_dead or one.batcher.stalled_seconds() > _WEDGED_SECONDS
            for one in backbones
        )

    def choose(self, name: str, version: str = "") -> list[Model]:
        """The model of this name and version, the only one for "", and every one's default for `all`.

        Raises RequestError where there is no such model, or none is named and there are several.
        """
        models = self.check_ready().models
        if name == ALL_MODELS and name not in models:
            if version:
                raise RequestError(
                    "bad_parameter",
                    "model=all takes no version: each model answers with its default",
                )
            return [served.choose() for served in models.values()]
        if name in models or (not name and len(models) == 1):
            served = models[name] if name else next(iter(models.values()))
            return [served.choose(version)]
        names = ", ".join(sorted(models)[:50])
        if name:
            raise RequestError(
                "no_such_model",
                f"there is no model {name[:100]!r} that can be served; there is {names}",
            )
        raise RequestError(
            "model_required", f"several models are served; say which in 'model' (or 'all'): {names}"
        )

    async def classify(
        self, request: Request, models: Sequence[Model], images: Sequence[bytes | Pixels]
    ) -> list[Answer]:
        """One answer per model, in time or not at all: the work ends as soon as the client hangs up.

        Raises RequestError for the whole request, and ClientDisconnect; images that cannot be read are in the answers.
        """
        start = time.monotonic()
        deadline = start + self.settings.deadline_seconds
        asked = [*models, *self._shadows_beside(models)]
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
        for answer in answers[: len(models)]:
            labels = (answer.model.checkpoint.name, str(answer.model.checkpoint.version))
            num_unreadable = sum(isinstance(result, ImageError) for result in answer.results)
            metrics.note(metrics.PREDICT_SECONDS, labels, seconds)
            metrics.note(metrics.IMAGES, (*labels, "answered"), len(images) - num_unreadable)
            if num_unreadable:
                metrics.note(metrics.IMAGES, (*labels, "unreadable"), num_unreadable)
        self._compare_shadows(answers[: len(models)], answers[len(models) :], images)
        return answers[: len(models)]

    def _shadow_of(self, model: Model) -> Model | None:
        served = self.repository.current.models.get(model.checkpoint.name)
        shadow = served.shadow if served is not None else None
        return shadow if shadow is not model else None

    def _shadows_beside(self, models: Sequence[Model]) -> list[Model]:
        """Shadows on a backbone that is asked anyway: they cost their head."""
        backbones = {model.backbone.fingerprint for model in models}
        shadows = (self._shadow_of(model) for model in models)
        return [
            shadow
            for shadow in shadows
            if shadow is not None and shadow.backbone.fingerprint in backbones
        ]

    def _compare_shadows(
        self, answers: Sequence[Answer], beside: Sequence[Answer], images: Sequence[bytes | Pixels]
    ) -> None:
        known = {answer.model.checkpoint.name: answer for answer in beside}
        for answer in answers:
            shadow = self._shadow_of(answer.model)
            if shadow is None:
                continue
            if answer.model.checkpoint.name in known:
                _count_shadow(answer, known[answer.model.checkpoint.name])
            elif len(self._shadows) < _MAX_SHADOWS:
                # On another backbone it costs a pass of its own, and nobody waits for it.
                task = asyncio.create_task(self._ask_shadow(shadow, answer, images))
                self._shadows.add(task)
                task.add_done_callback(self._shadows.discard)
            else:
                _count_skipped(shadow, len(images))

    async def _ask_shadow(
        self, shadow: Model, answer: Answer, images: Sequence[bytes | Pixels]
    ) -> None:
        try:
            deadline = time.monotonic() + self.settings.deadline_seconds
            (other,) = await self.predictor.predict([shadow], images, deadline=deadline)
        except RequestError:
            _count_skipped(shadow, len(images))
        else:
            _count_shadow(answer, other)

    async def _load_and_watch(self) -> None:
        try:
            current = await self.repository.refresh()
        except GraftError as error:
            self._load_error = str(error)
            logger.error("%s", error)
            return
        # The process stays up to say that it is not ready; the cause is in the log.
        except Exception:
            self._load_error = "the models could not be loaded; the server's log says why"
            logger.exception("the models could not be loaded from %s", self.settings.checkpoints)
            return
        self.is_loaded = True
        _spare_the_collector()
        if not current.models:
            logger.warning(
                "%s (CHECKPOINTS is %s)", self._how_to_get_a_model(), self.settings.checkpoints
            )
        if self.settings.poll_seconds:
            await self.repository.watch()

    def _how_to_get_a_model(self) -> str:
        what = (
            "no checkpoint could be loaded, GET /v1/models says why"
            if self.repository.current.refused
            else "there is no checkpoint yet"
        )
        then = "it is served as soon as it is there" if self.settings.poll_seconds else "restart"
        return f"{what}: make one with `make run`, or put one at <name>/<version>/ in the folder CHECKPOINTS; {then}"

    def _end(self) -> None:
        """Without an engine this process is of no use: it answers what it has, and ends for its parent to start another."""
        os.kill(os.getpid(), signal.SIGTERM)

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
            loop.call_soon_threadsafe(
                loop.call_later, self.settings.drain_seconds, stop, number, frame
            )

        signal.signal(signal.SIGTERM, drain)


def _spare_the_collector() -> None:
    """What was loaded stays, and is not looked through again and again: in a storm that took a fifth of the event loop's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def _count_shadow(answer: Answer, other: Answer) -> None:
    """Whether the shadow names the labels that were sent, image by image."""
    model = other.model.checkpoint
    for result, shadowed in zip(answer.results, other.results, strict=True):
        if isinstance(result, ImageError) or isinstance(shadowed, ImageError):
            continue
        agrees = set(named_labels(result, answer.model.checkpoint)) == set(
            named_labels(shadowed, model)
        )
        metrics.note(
            metrics.SHADOW, (model.name, str(model.version), "agrees" if agrees else "differs")
        )


def _count_skipped(shadow: Model, num_images: int) -> None:
    metrics.note(
        metrics.SHADOW,
        (shadow.checkpoint.name, str(shadow.checkpoint.version), "skipped"),
        num_images,
    )


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, cancelled as soon as the client hangs up: nobody would read the answer. Raises ClientDisconnect then."""
    working = asyncio.current_task()
    assert working is not None
    watching: asyncio.Task[None] | None = None

    async def watch() -> None:
        # The body has been read, so the next message is the end of the connection.
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
