"""The tensors of a network that training changes, by name."""

from __future__ import annotations

import torch
from torch import nn

from models.backbone.freezing import Freezing

Tensors = dict[str, torch.Tensor]


def changing_tensors(model: nn.Module, freezing: Freezing) -> Tensors:
    """The parameters and buffers that are not frozen, by name: the network's own, no copies."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name not in freezing.digests}


def copy_tensors(source: Tensors, target: Tensors) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
