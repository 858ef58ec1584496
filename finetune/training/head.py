"""The head that gradient epochs start from."""

from __future__ import annotations

import traceback

import torch

from finetune.probe.solve import Probe
from models.backbone.build import Backbone
from models.errors import GraftError
from models.named import import_named


def start_head(backbone: Backbone, solved: Probe, head_init: str) -> None:
    """Set the head's weight `[C,F]` and bias `[C]` as `--head-init` says.

    Raises GraftError where the function fails, or leaves another shape, NaN or infinite values.
    """
    weight, bias = torch.from_numpy(solved.weight), torch.from_numpy(solved.bias)
    with torch.no_grad():
        if head_init in ("soft", "probe"):
            backbone.head.weight.copy_(weight)
            backbone.head.bias.copy_(bias)
        elif head_init == "zeros":
            backbone.head.weight.zero_()
            backbone.head.bias.zero_()
        else:
            _apply(backbone, head_init)
    head = backbone.head
    if head.bias is None or (head.weight.shape, head.bias.shape) != (weight.shape, bias.shape):
        left = None if head.bias is None else list(head.bias.shape)
        raise GraftError(
            f"--head-init {head_init}: it leaves weight {list(head.weight.shape)} and bias "
            f"{left}, not {list(weight.shape)} and {list(bias.shape)}"
        )
    if not (head.weight.isfinite().all() and head.bias.isfinite().all()):
        raise GraftError(f"--head-init {head_init}: it leaves NaN or infinite values in the head")


def _apply(backbone: Backbone, name: str) -> None:
    function = import_named("--head-init", name)
    try:
        backbone.head.apply(function)
    # The user's own code may raise anything, which is shown with the line it came from.
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        raise GraftError(
            f"--head-init {name}: it raised {type(error).__name__}: {error} ({where}); it is "
            "given an nn.Linear"
        ) from error
