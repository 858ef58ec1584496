"""Cut a network at its freeze boundary: the frozen part runs once per image.

The rest runs the network's own forward, in which frozen modules return placeholders: the last one
the kept activation, the earlier ones NaN of the right shape, which nothing may read. So no
architecture needs to be known, and whether a network can be cut (no connection skips the boundary,
not even one whose weight is still zero) is found by comparing outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.backbone.freezing import Freezing

Forward = Callable[..., torch.Tensor]


class FrozenPart(nn.Module):
    """Images `[B,3,H,W]` → the activation at the boundary, flattened, `[B,D]`."""

    def __init__(self, model: nn.Module, boundary: str) -> None:
        super().__init__()
        self.model = model
        self._boundary = boundary

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        # A copy: what follows may work in place.
        hook = self.model.get_submodule(self._boundary).register_forward_hook(
            lambda _, __, output: kept.append(output.clone())
        )
        try:
            self.model(images)
        finally:
            hook.remove()
        return kept[0].flatten(1)


class TrainablePart(nn.Module):
    """Activations `[B,D]` → logits `[B,C]`; while open, frozen modules return placeholders."""

    def __init__(
        self,
        model: nn.Module,
        units: list[str],
        shapes: dict[str, tuple[int, ...]],
        memory_format: torch.memory_format,
    ) -> None:
        super().__init__()
        self._memory_format = memory_format
        self.model = model
        self.boundary = units[-1]
        self._shapes = shapes
        self._activation = torch.empty(0)
        self._own_forwards: dict[str, Forward | None] = {}

    @property
    def boundary_shape(self) -> tuple[int, ...]:
        """The activation's, without the batch."""
        return self._shapes[self.boundary]

    @property
    def boundary_size(self) -> int:
        """Values of the activation an image."""
        return math.prod(self.boundary_shape)

    def open(self) -> None:
        for name, shape in self._shapes.items():
            unit: Any = self.model.get_submodule(name)
            self._own_forwards[name] = vars(unit).get("forward")
            unit.forward = self._give_activation if name == self.boundary else self._give_nan(shape)

    def close(self) -> None:
        for name, own_forward in self._own_forwards.items():
            unit: Any = self.model.get_submodule(name)
            if own_forward is None:
                del unit.forward  # the class's own shows again
            else:
                unit.forward = own_forward
        self._own_forwards = {}

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        self._activation = activations.reshape(len(activations), *self.boundary_shape)
        if self._activation.dim() == 4:
            self._activation = self._activation.contiguous(memory_format=self._memory_format)
        image = activations.new_full((1,), torch.nan).expand(len(activations), 3, 1, 1)
        logits: torch.Tensor = self.model(image)
        return logits

    def _give_activation(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._activation

    def _give_nan(self, shape: tuple[int, ...]) -> Forward:
        return lambda *_, **__: self._activation.new_full((1,), torch.nan).expand(
            len(self._activation), *shape
        )


def cut(
    model: nn.Module,
    freezing: Freezing,
    images: torch.Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> TrainablePart | None:
    """The trainable part of a network, not yet open; None where nothing can be cut off.

    The cut is tried on `images` `[B,3,H,W]`; the trainable part works in `memory_format`. The
    network is left in eval.
    """
    model.eval()
    shapes: dict[str, tuple[int, ...]] = {}
    order: list[str] = []

    def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            order.append(name)
            if isinstance(output, torch.Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(remember(name))
        for name in _frozen_units(model, freezing)
    ]
    with torch.no_grad():
        expected = model(images)
    for hook in hooks:
        hook.remove()
    # A unit that gave no tensor, or that was called twice, has no single activation to keep.
    if not order or len(order) != len(shapes):
        return None
    rest = TrainablePart(model, order, shapes, memory_format)
    with torch.no_grad():
        activation = FrozenPart(model, rest.boundary)(images)
        rest.open()
        try:
            fits = torch.allclose(
                rest(activation), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
            )
        # The network's own forward may raise anything on an image of one pixel; timm's patch
        # embedding raises AssertionError.
        except Exception:
            fits = False
        finally:
            rest.close()
    return rest if fits else None


def _frozen_units(model: nn.Module, freezing: Freezing) -> list[str]:
    """The largest modules that are frozen with all their descendants."""
    units: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        whole = name in freezing.frozen_modules and all(
            prefix + child in freezing.frozen_modules
            for child, _ in module.named_modules()
            if child
        )
        if whole and name and not any(name.startswith(f"{unit}.") for unit in units):
            units.append(name)
    return units
