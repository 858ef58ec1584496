"""Heat maps of where a network looked: Grad-CAM (arXiv 1610.02391), by captum."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn

from finetune.probe.solve import Head
from finetune.training.inputs import Normalise
from finetune.training.layer_stats import channel_dim
from models.backbone.build import build_from_config
from models.errors import GraftError
from models.images import Pixels
from models.prepared import PreparedBackbone
from models.scores import Floats

logger = logging.getLogger("graft.explain")


def explain(
    backbone: PreparedBackbone, head: Head, crops: Sequence[Pixels], answers: Sequence[int]
) -> list[Floats]:
    """How much each place of a crop `uint8 [H,W,3]` speaks for the answer: `float32 [H,W]`, 0 to 1.

    Measured at the last stage with places that the answer depends on, one image at a time: memory
    may be short here. Raises GraftError where there is no such stage, or where no backward pass is
    possible.
    """
    model = build_from_config(
        backbone.config,
        {name: torch.from_numpy(array) for name, array in backbone.read_tensors().items()},
    )
    linear = model.get_submodule(backbone.classifier)
    linear.weight, linear.bias = (
        nn.Parameter(torch.from_numpy(np.asarray(array, np.float32)))
        for array in (head.weight, head.bias)
    )
    normalise = Normalise(backbone.preprocess, torch.device("cpu"), torch.contiguous_format)
    batches = [normalise(torch.from_numpy(crop.copy())[None]) for crop in crops]
    try:
        for stage in _stages_with_places(model, backbone, batches[0]):
            heats = [
                _gradients_times_activations(model, stage, *given)
                for given in zip(batches, answers, strict=True)
            ]
            # Where only the class token is read, the last stage's other tokens have no gradient.
            if any(heat.abs().max() > 0 for heat in heats):
                logger.info("where it looked for its worst mistakes: Grad-CAM at %s", stage)
                return [_to_picture(heat, crop) for heat, crop in zip(heats, crops, strict=True)]
    # A user's own network may raise anything in a backward pass.
    except Exception as error:
        raise GraftError(
            f"{backbone.name}: Grad-CAM cannot be computed: {type(error).__name__}: {error}"
        ) from error
    raise GraftError(
        f"{backbone.name}: Grad-CAM needs a stage with places ([B,C,H,W] or tokens) on the way to "
        "the answer, and there is none"
    )


def _stages_with_places(
    model: nn.Module, backbone: PreparedBackbone, images: torch.Tensor
) -> list[str]:
    """The stages whose output has the form of maps, the last one first."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if (
                isinstance(output, torch.Tensor)
                and output.ndim in (3, 4)
                and _to_maps(output).shape[2:].numel() > 1
            ):
                found.append(name)

        return note

    names = [backbone.module_prefix + stage for stage in backbone.stages]
    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(images)
    for handle in hooks:
        handle.remove()
    return found[::-1]


def _gradients_times_activations(
    model: nn.Module, stage: str, images: torch.Tensor, answer: int
) -> torch.Tensor:
    """Grad-CAM at a stage, signed, `[1,1,h,w]`; captum reads maps behind an identity."""
    maps = nn.Identity()
    handle = model.get_submodule(stage).register_forward_hook(
        lambda _, __, output: _from_maps(maps(_to_maps(output)), output)
    )
    try:
        heat: torch.Tensor = LayerGradCam(model, maps).attribute(images, target=answer)
    finally:
        handle.remove()
    return heat.detach()


def _to_maps(output: torch.Tensor) -> torch.Tensor:
    """`[B,C,h,w]` from maps in either layout, or from the last tokens that fill a square."""
    if output.ndim == 4:
        return output.movedim(channel_dim(output), 1)
    side = math.isqrt(output.shape[1])
    return (
        output[:, output.shape[1] - side * side :]
        .transpose(1, 2)
        .reshape(len(output), -1, side, side)
    )


def _from_maps(maps: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_maps`; other tokens come from `output`."""
    if output.ndim == 4:
        return maps.movedim(1, channel_dim(output))
    tokens = maps.flatten(2).transpose(1, 2)
    return torch.cat((output[:, : output.shape[1] - tokens.shape[1]], tokens), dim=1)


def _to_picture(heat: torch.Tensor, crop: Pixels) -> Floats:
    """`[H,W]` of the crop; negative values, which speak against the answer, become 0."""
    upsampled = LayerAttribution.interpolate(heat, crop.shape[:2], "bilinear")[0, 0].clamp(min=0)
    return np.asarray(upsampled / upsampled.max().clamp(min=1e-12), np.float32)
