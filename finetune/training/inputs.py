"""What gradient epochs read: crops decoded anew in every epoch, or activations kept at the freeze boundary, computed once."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.data.views import Augment, draw_view
from finetune.probe.features import extract_features
from finetune.training.activations import Activations, Batch, Bf16File, Target
from finetune.training.boundary import FrozenPart, TrainablePart, cut
from models.backbone.build import Backbone
from models.backbone.export import export_openvino
from models.backbone.freezing import Freezing
from models.engine.engine import Engine
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.torch_engine import TorchEngine
from models.errors import GraftError
from models.preprocess import ImageError, Preprocess, View

logger = logging.getLogger("graft.inputs")

# Of augmented views kept at the boundary, when `--views` does not say: epochs beyond see the first ones again.
_MAX_VIEWS = 4
# Never more than this share of what is free where the activations go.
_MAX_DISK_FRACTION = 0.5


class ImageGoneError(GraftError):
    """An image that could be read when the run began is gone or changed."""


class Crops(Dataset[Batch]):
    """Samples as `uint8 [H,W,3]` crops with their `targets`.

    Each epoch draws views of its own, the same in every worker.
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
    """Data sets for training and validation, the network that takes them, and what makes a batch of them ready for it."""

    train: Crops | Activations
    val: Crops | Activations
    network: nn.Module
    prepare: Callable[[torch.Tensor], torch.Tensor]
    num_workers: int

    def close(self) -> None:
        """Give the frozen modules their own forward back."""
        if isinstance(self.network, TrainablePart):
            self.network.close()


def open_inputs(
    backbone: Backbone,
    freezing: Freezing,
    splits: Splits,
    options: Options,
    scratch: Path,
    device: torch.device,
) -> Inputs:
    """Activations at the boundary where they can be kept, else crops; says which, and why.

    `scratch` is the run's own: whole files of activations in it are not computed again.
    """
    # On the CPU, too: ResNet-18 trains 1.2 times as fast as in torch's own order, EfficientNet-Lite0, with finetune.training.depthwise, twice.
    memory_format = _try_channels_last(backbone, splits)
    rest = _try_cut(backbone, freezing, splits, options, memory_format)
    if rest is not None:
        num_views = (
            1
            if options.augment == "none"
            else options.views
            if options.views > 1
            else min(options.epochs, _MAX_VIEWS)
        )
        size = int(np.prod(rest.boundary_shape))
        already = sum(path.stat().st_size for path in scratch.glob("*.npy"))
        num_bytes = max(0, 2 * size * (len(splits.train) * num_views + len(splits.val)) - already)
        free = shutil.disk_usage(scratch).free * _MAX_DISK_FRACTION
        if num_bytes <= free:
            return _keep_activations(
                backbone, rest, freezing, splits, options, scratch, num_views, size, device
            )
        logger.warning(
            "activations at %s would take %.1f GB, half of the free disk is %.1f GB: the frozen layers run anew in each epoch",
            rest.boundary,
            num_bytes / 1e9,
            free / 1e9,
        )
    return Inputs(
        Crops(
            splits.train,
            backbone.preprocess,
            targets=_targets(splits, splits.train),
            augment=options.augment,
            seed=options.seed,
        ),
        Crops(splits.val, backbone.preprocess, targets=_targets(splits, splits.val)),
        backbone.model,
        Normalise(backbone.preprocess, device, memory_format),
        options.workers,
    )


class Normalise:
    """`uint8 [B,H,W,3]` → `float32 [B,3,H,W]` with the backbone's mean and std, on the device and in its memory format."""

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
    """Lay the network out for channels_last, unless a module of its own cannot take that (`view` on what a convolution gave, say)."""
    memory_format: torch.memory_format = torch.channels_last
    backbone.model.eval().to(memory_format=memory_format)
    try:
        with torch.no_grad():
            backbone.model(_two_images(backbone, splits, memory_format))
    except RuntimeError:
        memory_format = torch.contiguous_format
        backbone.model.to(memory_format=memory_format)
        logger.info(
            "the network cannot take images in channels_last, the faster order: it trains in torch's own"
        )
    return memory_format


def _try_cut(
    backbone: Backbone,
    freezing: Freezing,
    splits: Splits,
    options: Options,
    memory_format: torch.memory_format,
) -> TrainablePart | None:
    if not options.cache or not freezing.frozen_modules:
        return None
    rest = cut(
        backbone.model, freezing, _two_images(backbone, splits, memory_format), memory_format
    )
    if rest is None:
        logger.warning(
            "this network cannot be cut at its freeze boundary: the frozen layers run anew in each epoch"
        )
    return rest


def _two_images(
    backbone: Backbone, splits: Splits, memory_format: torch.memory_format
) -> torch.Tensor:
    crops = torch.stack([_read_crop(sample, backbone.preprocess) for sample in splits.train[:2]])
    return Normalise(backbone.preprocess, torch.device("cpu"), memory_format)(crops)


def _keep_activations(
    backbone: Backbone,
    rest: TrainablePart,
    freezing: Freezing,
    splits: Splits,
    options: Options,
    scratch: Path,
    num_views: int,
    size: int,
    device: torch.device,
) -> Inputs:
    engine = functools.cache(
        lambda: _frozen_engine(backbone, rest.boundary, options, scratch, device)
    )

    def keep(samples: Sequence[Sample], name: str, view: int) -> Bf16File:
        augment: Augment = options.augment if view else "none"
        drawn = (augment, view, options.seed) if view else ()
        what = [
            freezing.digests,
            rest.boundary,
            backbone.preprocess.to_dict(),
            drawn,
            [sample.key for sample in samples],
        ]
        kept = Bf16File(scratch / f"{name}.npy", len(samples), size, json.dumps(what))
        if kept.is_kept:
            return kept
        unreadable = extract_features(
            samples,
            backbone.preprocess,
            engine(),
            num_workers=options.workers,
            description=f"activations of {name}",
            out=kept,
            draw=lambda index: draw_view(augment, options.seed, view, index),
        ).unreadable
        # They could be read for the probe. Left out here, they would shift the rows behind them against the labels.
        for key, reason in unreadable.items():
            raise ImageGoneError(_say_gone(key, reason))
        kept.keep()
        return kept

    # With one view it is the plain crop; with several they are all augmented, as they would be in epochs without the cache.
    first = 0 if num_views == 1 else 1
    views = [keep(splits.train, f"train-{view}", view) for view in range(first, first + num_views)]
    val = keep(splits.val, "val", 0)
    if engine.cache_info().currsize:
        engine().close()
    logger.info(
        "kept activations at %s: %d values an image, %d views", rest.boundary, size, num_views
    )
    rest.open()
    return Inputs(
        Activations(views, _targets(splits, splits.train)),
        Activations([val], _targets(splits, splits.val)),
        rest,
        torch.Tensor.float,
        0,
    )


def _read_crop(sample: Sample, preprocess: Preprocess, view: View | None = None) -> torch.Tensor:
    """`uint8 [H,W,3]`. Raises ImageGoneError."""
    try:
        return torch.from_numpy(preprocess(sample.read(), view=view).copy())
    except (ImageError, OSError) as error:
        raise ImageGoneError(
            _say_gone(
                sample.key,
                error.strerror or str(error) if isinstance(error, OSError) else str(error),
            )
        ) from None


def _say_gone(key: str, reason: str) -> str:
    return f"{key}: gone or changed since the run began ({reason}); put back what was there"


def _targets(splits: Splits, samples: Sequence[Sample]) -> Sequence[Target]:
    return splits.task.training_targets(splits.labels(samples))


def _frozen_engine(
    backbone: Backbone, boundary: str, options: Options, scratch: Path, device: torch.device
) -> Engine:
    logger.info("converting the frozen layers, up to %s, for the engine …", boundary)
    frozen = FrozenPart(backbone.model, boundary)
    if device.type == "cuda":
        return TorchEngine(frozen, backbone.preprocess, precision=options.precision)
    path = scratch / "frozen.xml"
    export_openvino(frozen, backbone.name, backbone.preprocess, path)
    return OpenVINOEngine(path, backbone.preprocess, precision=options.precision)
