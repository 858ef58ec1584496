"""What gradient epochs read: crops, or activations kept at the freeze boundary."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from finetune.data.splits import Sample, Splits
from finetune.data.views import Augment, draw_view
from finetune.probe.features import extract_features
from finetune.training.activations import Activations, Batch, Bf16File, Target
from finetune.training.boundary import FrozenPart, TrainablePart, cut
from finetune.training.settings import TrainingSettings
from models.backbone.build import Backbone
from models.backbone.export import export_openvino
from models.backbone.freezing import Freezing
from models.engine.engine import Engine
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.torch_engine import TorchEngine
from models.errors import GraftError
from models.images import ImageError
from models.preprocess import Preprocess, View

logger = logging.getLogger("graft.inputs")

# Augmented views kept at the boundary without `--views`: later epochs see the first ones again.
_MAX_VIEWS = 4
# Never more than this share of what is free where the activations go.
_MAX_DISK_FRACTION = 0.5


class ImageGoneError(GraftError):
    """An image that could be read when the run began is gone or changed."""


class Crops(Dataset[Batch]):
    """Samples as `uint8 [H,W,3]` crops with their `targets`.

    Each epoch draws its own augmented views, the same in every worker.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        *,
        targets: Sequence[Target],
        augment: Augment = "none",
        seed: int = 0,
    ) -> None:
        self._samples = samples
        self._targets = targets
        self._preprocess = preprocess
        self._augment: Augment = augment
        self._seed = seed
        self.epoch = 1

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Batch:
        sample = self._samples[index]
        view = draw_view(self._augment, self._seed, self.epoch, index)
        return _read_crop(sample, self._preprocess, view), self._targets[index]


@dataclass(frozen=True)
class Inputs:
    """Data sets, the network that reads them, and `prepare`, which turns a batch into its input."""

    train: Crops | Activations
    val: Crops | Activations
    network: nn.Module
    prepare: Callable[[torch.Tensor], torch.Tensor]
    num_workers: int

    def close(self) -> None:
        """Restore the forward of the frozen modules."""
        if isinstance(self.network, TrainablePart):
            self.network.close()


def open_inputs(
    backbone: Backbone,
    freezing: Freezing,
    splits: Splits,
    settings: TrainingSettings,
    scratch: Path,
    device: torch.device,
) -> Inputs:
    """Activations at the freeze boundary where they can be kept, else crops; logs which, and why.

    `scratch` is the run's own: whole files of activations in it are not computed again. Raises
    ImageGoneError where an image can no longer be read.
    """
    # On the CPU, too: ResNet-18 trains 1.2 times as fast as in torch's own order,
    # EfficientNet-Lite0, with finetune.training.depthwise, twice.
    memory_format = _try_channels_last(backbone, splits)
    rest = None
    if settings.cache and freezing.frozen_modules:
        rest = _try_cut(backbone, freezing, splits, memory_format)
    if rest is not None and _fits_on_disk(rest, splits, settings, scratch):
        return _keep_activations(backbone, freezing, rest, splits, settings, scratch, device)
    return Inputs(
        Crops(
            splits.train,
            backbone.preprocess,
            targets=_targets(splits, splits.train),
            augment=settings.augment,
            seed=settings.seed,
        ),
        Crops(splits.val, backbone.preprocess, targets=_targets(splits, splits.val)),
        backbone.model,
        Normalise(backbone.preprocess, device, memory_format),
        settings.workers,
    )


class Normalise:
    """`uint8 [B,H,W,3]` → `float32 [B,3,H,W]`, normalised, on the device, in the memory format."""

    def __init__(
        self, preprocess: Preprocess, device: torch.device, memory_format: torch.memory_format
    ) -> None:
        self._memory_format = memory_format
        self._mean = torch.tensor(preprocess.mean, device=device) * 255
        self._std = torch.tensor(preprocess.std, device=device) * 255

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (
            ((images.float() - self._mean) / self._std)
            .permute(0, 3, 1, 2)
            .contiguous(memory_format=self._memory_format)
        )


def _try_channels_last(backbone: Backbone, splits: Splits) -> torch.memory_format:
    """Lay the network out in channels_last, unless a module of its own cannot run in it."""
    memory_format: torch.memory_format = torch.channels_last
    backbone.model.eval().to(memory_format=memory_format)
    try:
        with torch.no_grad():
            backbone.model(_two_images(backbone, splits, memory_format))
    except RuntimeError:
        memory_format = torch.contiguous_format
        backbone.model.to(memory_format=memory_format)
        logger.info(
            "the network cannot take images in channels_last, the faster order: it trains in "
            "torch's own order"
        )
    return memory_format


def _try_cut(
    backbone: Backbone, freezing: Freezing, splits: Splits, memory_format: torch.memory_format
) -> TrainablePart | None:
    images = _two_images(backbone, splits, memory_format)
    rest = cut(backbone.model, freezing, images, memory_format)
    if rest is None:
        logger.warning(
            "this network cannot be cut at its freeze boundary: the frozen layers run anew in "
            "each epoch"
        )
    return rest


def _fits_on_disk(
    rest: TrainablePart, splits: Splits, settings: TrainingSettings, scratch: Path
) -> bool:
    num_values = rest.boundary_size * (len(splits.train) * _num_views(settings) + len(splits.val))
    already = sum(path.stat().st_size for path in scratch.glob("*.npy"))
    num_bytes = max(0, 2 * num_values - already)
    free = shutil.disk_usage(scratch).free * _MAX_DISK_FRACTION
    if num_bytes > free:
        logger.warning(
            "activations at %s would take %.1f GB, half of the free disk is %.1f GB: the frozen "
            "layers run anew in each epoch",
            rest.boundary,
            num_bytes / 1e9,
            free / 1e9,
        )
    return num_bytes <= free


def _num_views(settings: TrainingSettings) -> int:
    """Of each training image, kept at the boundary."""
    if settings.augment == "none":
        return 1
    return settings.views if settings.views > 1 else min(settings.epochs, _MAX_VIEWS)


def _two_images(
    backbone: Backbone, splits: Splits, memory_format: torch.memory_format
) -> torch.Tensor:
    crops = torch.stack([_read_crop(sample, backbone.preprocess) for sample in splits.train[:2]])
    return Normalise(backbone.preprocess, torch.device("cpu"), memory_format)(crops)


def _keep_activations(
    backbone: Backbone,
    freezing: Freezing,
    rest: TrainablePart,
    splits: Splits,
    settings: TrainingSettings,
    scratch: Path,
    device: torch.device,
) -> Inputs:
    num_views = _num_views(settings)
    # With one view it is the plain crop; with several all are augmented, as in epochs without the
    # cache.
    first = 0 if num_views == 1 else 1
    with contextlib.closing(
        _ActivationKeeper(backbone, freezing, rest, settings, scratch, device)
    ) as keeper:
        views = [
            keeper.keep(splits.train, f"train-{view}", view)
            for view in range(first, first + num_views)
        ]
        val = keeper.keep(splits.val, "val", 0)
    logger.info(
        "kept activations at %s: %d values an image, %d views",
        rest.boundary,
        rest.boundary_size,
        num_views,
    )
    rest.open()
    return Inputs(
        Activations(views, _targets(splits, splits.train)),
        Activations([val], _targets(splits, splits.val)),
        rest,
        torch.Tensor.float,
        0,
    )


class _ActivationKeeper:
    """Writes activations at the boundary to `scratch`; opens the engine if a file is missing."""

    def __init__(
        self,
        backbone: Backbone,
        freezing: Freezing,
        rest: TrainablePart,
        settings: TrainingSettings,
        scratch: Path,
        device: torch.device,
    ) -> None:
        self._backbone = backbone
        self._freezing = freezing
        self._rest = rest
        self._settings = settings
        self._scratch = scratch
        self._device = device
        self._engine: Engine | None = None

    def keep(self, samples: Sequence[Sample], name: str, view: int) -> Bf16File:
        """Activations of the samples' `view`-th views, 0 the plain crop, in a file of that name."""
        settings, preprocess = self._settings, self._backbone.preprocess
        augment: Augment = settings.augment if view else "none"
        drawn = (augment, view, settings.seed) if view else ()
        what = [
            self._freezing.digests,
            self._rest.boundary,
            preprocess.to_dict(),
            drawn,
            [sample.key for sample in samples],
        ]
        kept = Bf16File(
            self._scratch / f"{name}.npy", len(samples), self._rest.boundary_size, json.dumps(what)
        )
        if kept.is_kept:
            return kept
        unreadable = extract_features(
            samples,
            preprocess,
            self._open_engine(),
            num_workers=settings.workers,
            description=f"activations of {name}",
            out=kept,
            draw=lambda index: draw_view(augment, settings.seed, view, index),
        ).unreadable
        # They could be read for the probe. Left out here, they would shift the rows behind them
        # against the labels.
        for key, reason in unreadable.items():
            raise ImageGoneError(_describe_gone(key, reason))
        kept.keep()
        return kept

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._build_engine()
        return self._engine

    def _build_engine(self) -> Engine:
        backbone, boundary = self._backbone, self._rest.boundary
        logger.info("converting the frozen layers, up to %s, for the engine …", boundary)
        frozen = FrozenPart(backbone.model, boundary)
        precision = self._settings.precision
        if self._device.type == "cuda":
            return TorchEngine(frozen, backbone.preprocess, precision=precision)
        path = self._scratch / "frozen.xml"
        export_openvino(frozen, backbone.name, backbone.preprocess, path)
        return OpenVINOEngine(path, backbone.preprocess, precision=precision)


def _read_crop(sample: Sample, preprocess: Preprocess, view: View | None = None) -> torch.Tensor:
    """`uint8 [H,W,3]`. Raises ImageGoneError."""
    try:
        return torch.from_numpy(preprocess(sample.read(), view=view).copy())
    except ImageError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    raise ImageGoneError(_describe_gone(sample.key, reason))


def _describe_gone(key: str, reason: str) -> str:
    return f"{key}: gone or changed since the run began ({reason}); put back what was there"


def _targets(splits: Splits, samples: Sequence[Sample]) -> Sequence[Target]:
    return splits.task.training_targets(splits.labels(samples))
