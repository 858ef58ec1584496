"""Which checkpoints are served: the versions that each model's rollout asks for.

Checkpoints with one fingerprint share an engine and a queue. Before a checkpoint serves, its golden
images are replayed through the engine that will serve it. One that drifts or cannot be read is
refused, with the reason, and the version before goes on serving. The folder is read every second.
What is not the fault of a version's files is tried again.
A request keeps the models that it started with, and an engine closes after its last request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np

from models import checkpoint as checkpoints
from models.checkpoint import Checkpoint, Golden, UnreadableError
from models.engine.engine import EngineInfo, Precision
from models.engine.processor import cpu_name
from models.errors import GraftError, describe_error, join_first
from models.image_folder import has_images
from models.prepared import resolve_device
from models.preprocess import Preprocess
from service import metrics
from service.engine.batcher import Batcher
from service.engine.process import EngineDiedError, EngineProcess
from service.errors import RequestError
from service.inference.rollout import ROLLOUT_FILE, Rollout, read_rollout, write_rollout
from service.settings import Settings
from service.tasks.choose import task_of
from service.tasks.task import Task

logger = logging.getLogger("bentoml.graft")

Device = Literal["cpu", "cuda"]
# What changes when a file or folder is replaced; None where it is missing.
Stamp = tuple[int, int, int] | None
# The stamp of no file: a rollout with it is read again every time.
_NEVER_CURRENT: Stamp = (-1, -1, -1)
# What is not the files' fault, so that they may be loaded later, and the least pause until then.
_PASSING = (EngineDiedError, UnreadableError, OSError, MemoryError)
_RETRY_SECONDS = 10.0
_NO_GOLDEN = Golden((), np.empty((0, 0), np.float32))


@dataclass(frozen=True)
class Backbone:
    """An engine, its queue and its preprocess, shared by the models with this fingerprint."""

    fingerprint: str
    preprocess: Preprocess
    engine: EngineProcess
    batcher: Batcher


@dataclass(frozen=True)
class Model:
    """A checkpoint that serves on a backbone."""

    checkpoint: Checkpoint
    task: Task
    backbone: Backbone
    stamp: Stamp = None

    @property
    def info(self) -> EngineInfo:
        return self.backbone.engine.info


@dataclass(frozen=True)
class Refusal:
    """A version that is not served, or (without one) a model's folder or rollout, and why."""

    name: str
    version: int | None
    reason: str
    stamp: Stamp = None
    # On time.monotonic(), for what may pass by itself; None: once the files have changed.
    retry_at: float | None = None


@dataclass(frozen=True)
class Served:
    """The versions that are served under one name, and the rollout that chooses among them."""

    name: str
    versions: Mapping[int, Model]
    latest: int
    rollout: Rollout
    rollout_stamp: Stamp = None

    def choose(self, version: str = "") -> Model:
        """The model for a number, a label, `latest`, or "" for the default and its canary.

        Raises RequestError where it is not served.
        """
        model = self.versions.get(self.rollout.resolve(version, self.latest) or 0)
        if model is None:
            served = ", ".join(
                [f"latest ({self.latest})", *self.rollout.labels, *map(str, sorted(self.versions))]
            )
            raise RequestError(
                "no_such_version",
                f"model {self.name!r} has no version {version[:100]!r} here; available: {served}",
            )
        return model

    @property
    def default(self) -> Model:
        """The model that answers where the canary does not."""
        return self.choose(str(self.rollout.default))

    @property
    def shadow(self) -> Model | None:
        return self.versions.get(self.rollout.shadow or 0)


@dataclass(frozen=True)
class Snapshot:
    """What is served at one moment."""

    models: Mapping[str, Served] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()

    @cached_property
    def backbones(self) -> list[Backbone]:
        found = {
            model.backbone.fingerprint: model.backbone
            for served in self.models.values()
            for model in served.versions.values()
        }
        return list(found.values())

    def shadow_of(self, model: Model) -> Model | None:
        """The shadow version that is asked about the requests of `model` too."""
        served = self.models.get(model.checkpoint.name)
        shadow = served.shadow if served is not None else None
        return shadow if shadow is not model else None

    @property
    def versions(self) -> set[tuple[str, int]]:
        return {
            (name, version) for name, served in self.models.items() for version in served.versions
        }


class Repository:
    """The folder `root` as it is served now, for one event loop; loading takes another thread."""

    def __init__(
        self, settings: Settings, *, on_engine_death: Callable[[], None] = lambda: None
    ) -> None:
        """`on_engine_death` is called on the event loop when an engine's process dies."""
        self._on_engine_death = on_engine_death
        self.root = settings.checkpoints
        self.current = Snapshot()
        self._settings = settings
        self._loading = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def refresh(self, rollouts: Mapping[str, Rollout] | None = None) -> Snapshot:
        """Serve what the folder holds now; `rollouts` override the rollout.json files of their
        models.

        Bad checkpoints and rollout files are refused one by one. Raises GraftError where the
        configured device is missing or one of `rollouts` cannot be served; nothing has changed
        then.
        """
        async with self._loading:
            before = self.current
            after = await asyncio.to_thread(
                load_snapshot, self._settings, before, rollouts or {}, self._on_engine_death
            )
            for backbone in after.backbones:
                backbone.engine.attach()
            self.current = after
            _note_label_changes(before, after)
            self._close_unused(before, after)
            return after

    async def watch(self) -> None:
        """Refresh every `poll_seconds`, for ever; an error is logged once, and retried."""
        last_error = ""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self.refresh()
                last_error = ""
            # Whatever the error, the folder must go on being watched.
            except Exception as error:
                if repr(error) != last_error:
                    logger.exception("%s could not be read", self.root)
                last_error = repr(error)

    async def change_rollout(self, name: str, change: Callable[[Rollout], Rollout]) -> bool:
        """Change a model's rollout. False where it could not be written and ends with this process.

        Raises RequestError where there is no such model or the rollout cannot be served; nothing
        has changed then.
        """
        if (
            name == checkpoints.ALL_MODELS
            or not checkpoints.NAME_PATTERN.fullmatch(name)
            or not checkpoints.list_versions(self.root, name)
        ):
            raise RequestError("no_such_model", f"no model {name[:100]!r} is in the repository")
        async with self._changing:
            served = self.current.models.get(name)
            try:
                rollout = change(
                    served.rollout if served is not None else read_rollout(self.root / name)
                )
                await self.refresh({name: rollout})
            except GraftError as error:
                raise RequestError("bad_rollout", str(error)) from None
            try:
                await asyncio.to_thread(write_rollout, self.root / name, rollout)
            except OSError as error:
                logger.warning("the rollout of %s ends with this process: %s", name, error)
                return False
            return True

    async def close(self) -> None:
        """Finish what is in the queues, then close the engines."""
        async with self._loading:
            self._close_unused(self.current, Snapshot())
            for ended in await asyncio.gather(*self._closing, return_exceptions=True):
                if isinstance(ended, Exception):
                    logger.error("an engine could not be closed", exc_info=ended)

    def _close_unused(self, before: Snapshot, after: Snapshot) -> None:
        kept = [backbone.engine for backbone in after.backbones]
        for backbone in before.backbones:
            if backbone.engine not in kept:
                closing = asyncio.create_task(backbone.batcher.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for name, version in before.versions - after.versions:
            logger.info("unloaded %s version %d", name, version)
            metrics.forget(name, version)


def _note_label_changes(before: Snapshot, after: Snapshot) -> None:
    """Log and count the models whose default version now answers with other labels."""
    for name in before.models.keys() & after.models.keys():
        old, new = (snapshot.models[name].default.checkpoint for snapshot in (before, after))
        if old.label_names == new.label_names:
            continue
        logger.warning(
            "the labels of %s changed: version %d answers with %s, version %d before it with %s",
            name,
            new.version,
            join_first(new.label_names, 10),
            old.version,
            join_first(old.label_names, 10),
        )
        metrics.LABEL_CHANGES.labels(name).inc()


def load_snapshot(
    settings: Settings,
    before: Snapshot | None = None,
    rollouts: Mapping[str, Rollout] | None = None,
    on_engine_death: Callable[[], None] = lambda: None,
) -> Snapshot:
    """What the folder holds now; what has not changed is taken over from `before`.

    Takes seconds where a backbone is new: not for the event loop. Raises GraftError where the
    configured device is missing or one of `rollouts` cannot be served.
    """
    loader = _Loader(settings, before or Snapshot(), on_engine_death)
    models: dict[str, Served] = {}
    for name in checkpoints.list_names(settings.checkpoints):
        if served := loader.load(name, (rollouts or {}).get(name)):
            models[name] = served
    return Snapshot(models, tuple(loader.refused))


def explain_empty(root: Path) -> str:
    """What a folder without models is instead of a repository, and the way out; "" if unknown."""
    if not root.exists():
        return f"{root} does not exist"
    if not root.is_dir():
        return f"{root} is not a folder"
    try:
        if (root / checkpoints.CONFIG_FILE).is_file():
            return f"{root} is a version of a model; say CHECKPOINTS={root.parent.parent}"
        if checkpoints.list_versions(root.parent, root.name):
            return f"{root} is a model; say CHECKPOINTS={root.parent}"
        for inner in sorted(root.iterdir()):
            if checkpoints.list_names(inner):
                return f"{root} has the models in {inner.name}/; say CHECKPOINTS={inner}"
        if has_images(root):
            return (
                f"{root} is a folder of images; for a model of them say "
                f'make run ARGS="--data {root}"'
            )
    # The start of the service does not depend on it.
    except OSError:
        pass
    return ""


class _Loader:
    """Reads the repository once."""

    def __init__(
        self, settings: Settings, before: Snapshot, on_engine_death: Callable[[], None]
    ) -> None:
        self._on_engine_death = on_engine_death
        self.refused: list[Refusal] = []
        self._settings = settings
        self._root = settings.checkpoints
        self._before = before
        self._known = {(one.name, one.version, one.stamp): one for one in before.refused}
        self._device = resolve_device(settings.device)
        self._backbones = {backbone.fingerprint: backbone for backbone in before.backbones}

    def load(self, name: str, rollout: Rollout | None) -> Served | None:
        """The model with every version its rollout asks for; None where no version can be served.

        `rollout` goes before the file's. Raises GraftError where it cannot be served. A model whose
        folder cannot be read is served as before.
        """
        if name == checkpoints.ALL_MODELS:
            self._refuse(name, "the model", checkpoints.ALL_IS_RESERVED)
            return None
        before = self._before.models.get(name)
        try:
            listed = checkpoints.list_versions(self._root, name)
        except OSError as error:
            reason = f"its folder cannot be read: {describe_error(error)}"
            self._refuse(name, "the model", reason.replace(f"{self._root}/", ""))
            return before
        stamp = _stamp(self._root / name / ROLLOUT_FILE)
        if rollout is not None:
            return self._load_versions(name, listed, rollout, stamp)
        try:
            # A rollout set over HTTP that could not be written holds until the file changes.
            if before is not None and before.rollout_stamp == stamp:
                return self._load_versions(name, listed, before.rollout, stamp)
            return self._load_versions(name, listed, read_rollout(self._root / name), stamp)
        except GraftError as error:
            self._refuse(name, "the rollout of", str(error))
        for fallback in (before.rollout if before is not None else Rollout(), Rollout()):
            # The file is read again every time: the version that is missing may come.
            with contextlib.suppress(GraftError):
                return self._load_versions(name, listed, fallback, _NEVER_CURRENT)
        return None

    def _load_versions(
        self, name: str, listed: Sequence[int], rollout: Rollout, stamp: Stamp
    ) -> Served | None:
        versions: dict[int, Model] = {}
        latest = 0
        for version in reversed(listed):
            is_named = version in rollout.named_versions
            if (
                version not in rollout.unloaded
                and (is_named or not latest)
                and (model := self._load_version(name, version))
            ):
                versions[version] = model
                latest = latest or version
        if missing := sorted(rollout.named_versions - versions.keys()):
            reasons = (
                refusal.reason
                for refusal in self.refused
                if (refusal.name, refusal.version) == (name, missing[0])
            )
            reason = next(reasons, "there is no such version")
            raise GraftError(f"the rollout asks for version {missing[0]}: {reason}")
        return Served(name, versions, latest, rollout, stamp) if versions else None

    def _load_version(self, name: str, version: int) -> Model | None:
        path = self._root / name / str(version)
        stamp = _stamp(path / checkpoints.CONFIG_FILE)
        before = self._before.models.get(name)
        loaded = before.versions.get(version) if before is not None else None
        if loaded is not None and loaded.stamp == stamp:
            return loaded
        # A folder that is still being copied is refused, and tried again once it has changed.
        stamp_of_files = _stamp_of_files(path)
        known = self._known.get((name, version, stamp_of_files))
        if known is not None and (known.retry_at is None or time.monotonic() < known.retry_at):
            if known not in self.refused:
                self.refused.append(known)
            return None if known.retry_at is None else loaded
        start = time.perf_counter()
        try:
            model = replace(self._start_model(path), stamp=stamp)
        # Whatever its files make the libraries raise, the other checkpoints must be served.
        except Exception as error:
            may_pass = isinstance(error, _PASSING)
            refusal = Refusal(
                name,
                version,
                self._describe(name, version, error),
                stamp_of_files,
                time.monotonic() + _RETRY_SECONDS if may_pass else None,
            )
            self.refused.append(refusal)
            self._known[name, version, stamp_of_files] = refusal
            return loaded if may_pass else None
        logger.info(
            "loaded %s version %d in %.1f s: %s",
            name,
            version,
            time.perf_counter() - start,
            model.info,
        )
        return model

    def _start_model(self, path: Path) -> Model:
        checkpoint = checkpoints.load_checkpoint(path)
        backbone = self._backbones.get(checkpoint.fingerprint)
        is_new = backbone is None
        if backbone is None:
            engine = self._build_engine(checkpoint)
            batcher = Batcher(
                engine, max_images=self._settings.max_queue_images, name=checkpoint.fingerprint[:12]
            )
            backbone = Backbone(checkpoint.fingerprint, checkpoint.preprocess, engine, batcher)
        try:
            _replay_golden(checkpoint, backbone)
        except Exception:
            if is_new:
                backbone.engine.close()
            raise
        # Shared only now: an engine from broken files must not serve other checkpoints.
        self._backbones[checkpoint.fingerprint] = backbone
        # Without what only loading needs.
        return Model(
            replace(checkpoint, golden=_NO_GOLDEN, config={}), task_of(checkpoint), backbone
        )

    def _build_engine(self, checkpoint: Checkpoint) -> EngineProcess:
        """In the configured precision, else in the recorded one, else in what the device has."""
        if self._settings.precision is not None:
            return self._start_engine(checkpoint, self._settings.precision)
        recorded = cast(Precision, checkpoint.engine.get("precision", "auto"))
        try:
            return self._start_engine(checkpoint, recorded)
        except EngineDiedError:
            raise
        except GraftError as error:
            # The head was solved on the features of this precision: int8's differ from float's.
            if recorded in ("auto", "int8"):
                raise
            logger.warning(
                "%s was saved in %s, which this device lacks (%s): its best precision is used",
                checkpoint.path,
                recorded,
                error,
            )
            return self._start_engine(checkpoint, "auto")

    def _start_engine(self, checkpoint: Checkpoint, precision: Precision) -> EngineProcess:
        recorded = checkpoint.engine
        # On the same processor the recorded search holds; searching again takes most of a start.
        is_same = (
            self._device == "cpu"
            and recorded.get("device") == cpu_name()
            and recorded.get("precision") == precision
        )
        found = (
            {
                name: recorded.get(name)
                for name in ("batch_size", "num_streams", "images_per_second")
            }
            if is_same
            else {}
        )
        return EngineProcess(
            checkpoint.path,
            checkpoint.preprocess,
            checkpoint.config,
            max_pixels=self._settings.max_pixels,
            on_death=self._on_engine_death,
            device=self._device,
            precision=precision,
            **found,
        )

    def _describe(self, name: str, version: int, error: Exception) -> str:
        if isinstance(error, GraftError):
            logger.error("refused %s version %d: %s", name, version, error)
            # The reason is shown over HTTP: without this machine's paths.
            return (
                str(error)
                .replace(f"{self._root}/{name}/{version}: ", "")
                .replace(f"{self._root}/", "")
            )
        logger.exception("refused %s version %d", name, version, exc_info=error)
        return f"it cannot be loaded ({type(error).__name__}); the server's log says more"

    def _refuse(self, name: str, what: str, reason: str) -> None:
        refusal = Refusal(name, None, reason)
        if refusal not in self._before.refused:
            logger.error("refused %s %s: %s", what, name, reason)
        self.refused.append(refusal)


def _replay_golden(checkpoint: Checkpoint, backbone: Backbone) -> None:
    images = np.stack([backbone.preprocess(image) for image in checkpoint.golden.images])
    checkpoints.check_golden(
        checkpoint, checkpoints.logits(checkpoint, backbone.engine.run(images))
    )


def _stamp(path: Path) -> Stamp:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _stamp_of_files(folder: Path) -> Stamp:
    try:
        stamps: Iterable[Stamp] = [_stamp(path) for path in folder.iterdir()]
    except OSError:
        return None
    found = [stamp for stamp in stamps if stamp is not None]
    return (
        len(found),
        sum(stamp[1] for stamp in found),
        max((stamp[2] for stamp in found), default=0),
    )
