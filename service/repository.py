"""Which checkpoints are loaded: the newest good version of every model, grouped by backbone.

Checkpoints with one fingerprint share an engine and a queue. Before a checkpoint serves, its golden images are replayed
through the engine that will serve it; one that drifts or cannot be read is refused, with its reason, and the version before it
is tried.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from models import checkpoint as checkpoints
from models.checkpoint import Checkpoint
from models.engine import Engine, EngineInfo, Precision, cpu_name, run
from models.errors import GraftError
from models.prepared import build_engine, resolve_device
from models.preprocess import Preprocess
from service.batcher import Batcher
from service.settings import Settings

logger = logging.getLogger("bentoml.graft")

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Backbone:
    """One engine, its queue, and the images it wants; shared by every model with this fingerprint."""

    fingerprint: str
    preprocess: Preprocess
    engine: Engine
    batcher: Batcher


@dataclass(frozen=True)
class Model:
    """A checkpoint that serves on a backbone."""

    checkpoint: Checkpoint
    backbone: Backbone

    @property
    def info(self) -> EngineInfo:
        return self.backbone.engine.info


@dataclass(frozen=True)
class Refusal:
    """A version that is not served, and why."""

    name: str
    version: int
    reason: str


@dataclass(frozen=True)
class Repository:
    """What was loaded from the folder `root`."""

    root: Path
    models: Mapping[str, Model]
    refused: tuple[Refusal, ...]

    @property
    def backbones(self) -> list[Backbone]:
        return list({model.backbone.fingerprint: model.backbone for model in self.models.values()}.values())

    async def close(self) -> None:
        """Finish what is in every queue and close the engines."""
        for backbone in self.backbones:
            await backbone.batcher.close()


def load_repository(settings: Settings) -> Repository:
    """Load the newest version of every model that passes its golden images. Takes seconds: not for the event loop.

    Raises GraftError only where the asked-for device is not there; bad checkpoints are refused one by one.
    """
    root = settings.checkpoints
    device = resolve_device(settings.device)
    backbones: dict[str, Backbone] = {}
    models: dict[str, Model] = {}
    refused: list[Refusal] = []
    for name in checkpoints.list_names(root):
        for version in reversed(checkpoints.list_versions(root, name)):
            start = time.perf_counter()
            try:
                model = _load_model(root / name / str(version), backbones, device, settings)
            # One checkpoint must not keep the others from being served, whatever its files make the libraries raise.
            except Exception as error:
                refused.append(_refuse(root, name, version, error))
                continue
            models[name] = model
            logger.info("loaded %s version %d in %.1f s: %s", name, version, time.perf_counter() - start, model.info)
            break
    return Repository(root, models, tuple(refused))


def _load_model(path: Path, backbones: dict[str, Backbone], device: Device, settings: Settings) -> Model:
    checkpoint = checkpoints.load_checkpoint(path)
    backbone = backbones.get(checkpoint.fingerprint)
    if backbone is None:
        engine = _build_engine(checkpoint, device, settings.precision)
        batcher = Batcher(engine, max_images=settings.max_queue_images)
        backbone = Backbone(checkpoint.fingerprint, checkpoint.preprocess, engine, batcher)
    _replay_golden(checkpoint, backbone)
    # Shared only once its golden images passed: an engine built from broken files must not serve the checkpoints that follow.
    backbones[checkpoint.fingerprint] = backbone
    return Model(checkpoint, backbone)


def _replay_golden(checkpoint: Checkpoint, backbone: Backbone) -> None:
    images = np.stack([backbone.preprocess(image) for image in checkpoint.golden.images])
    checkpoints.check_golden(checkpoint, checkpoints.logits(checkpoint, run(backbone.engine, images)))


def _build_engine(checkpoint: Checkpoint, device: Device, asked: Precision | None) -> Engine:
    """The engine in the precision asked for, else in the recorded one, else in what this device can."""
    if asked is not None:
        return _start_engine(checkpoint, device, asked)
    recorded = cast(Precision, checkpoint.engine.get("precision", "auto"))
    try:
        return _start_engine(checkpoint, device, recorded)
    except GraftError as error:
        # Features of a quantised backbone are others than those of the float one, so its heads fit no other precision.
        if recorded in ("auto", "int8"):
            raise
        logger.warning("%s was saved in %s (%s): taking what this device can", checkpoint.path, recorded, error)
        return _start_engine(checkpoint, device, "auto")


def _start_engine(checkpoint: Checkpoint, device: Device, precision: Precision) -> Engine:
    recorded = checkpoint.engine
    # What the search found on this very processor holds, and searching again would cost most of the start.
    is_same = device == "cpu" and recorded.get("device") == cpu_name() and recorded.get("precision") == precision
    found = {name: recorded.get(name) for name in ("batch_size", "num_streams", "images_per_second")} if is_same else {}
    return build_engine(checkpoint.path, checkpoint.preprocess, checkpoint.config, device=device, precision=precision, **found)


def _refuse(root: Path, name: str, version: int, error: Exception) -> Refusal:
    if isinstance(error, GraftError):
        logger.error("refused %s version %d: %s", name, version, error)
        # The reason is shown over HTTP, where the paths of this machine are nobody's business.
        reason = str(error).replace(f"{root}/{name}/{version}: ", "").replace(f"{root}/", "")
    else:
        logger.exception("refused %s version %d", name, version, exc_info=error)
        reason = f"it cannot be loaded ({type(error).__name__}); the server's log says more"
    return Refusal(name, version, reason)
