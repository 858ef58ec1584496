"""Statistics of a network's stages in training: activations, dead units, gradients, step lengths.

Hooks measure the first batch of an epoch and every fiftieth; on all other batches there are none.
Nothing is changed and no random number is drawn, so that a run is bit by bit the same without them.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finetune.monitor import Monitor
from finetune.training.state import Progress
from models.backbone.build import Backbone
from models.backbone.freezing import Freezing, stages

logger = logging.getLogger("graft.layers")

_EVERY = 50
# A warning comes above this share of a stage's units, each measured on at least this many values.
_MAX_DEAD_FRACTION = 0.5
_MIN_VALUES = 64
_MAX_GRADIENT_SPREAD = 1e4
# A step's length is measured on this many of a stage's weights, evenly spread: a copy of all might
# not fit into memory.
_NUM_WEIGHTS = 100_000
# Classes of torch and timm: a unit whose output stays at or below zero passes on nothing, or next
# to nothing.
_RELU_LIKE = {
    "ReLU",
    "ReLU6",
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "SiLU",
    "Swish",
    "Hardswish",
    "HardSwish",
    "Mish",
    "HardMish",
}


@dataclass(frozen=True)
class Stage:
    """A named part of the network, with the ReLU-like modules in it or directly behind it."""

    name: str
    module: nn.Module
    activations: tuple[nn.Module, ...]
    is_head: bool

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


@dataclass
class _Range:
    """The lowest and highest of `num_values` values of each unit, `[C]`."""

    lowest: torch.Tensor
    highest: torch.Tensor
    num_values: int


@dataclass
class _BatchStats:
    """Of one batch; `totals` are sums of |activation| and numbers of values, in forward order."""

    totals: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    ranges: dict[str, dict[tuple[nn.Module, int], _Range]] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_total(self, stage: str, output: torch.Tensor) -> None:
        total, num_values = self.totals.get(stage, (torch.zeros(()), 0))
        norm = torch.linalg.vector_norm(output, ord=1, dtype=torch.float32)
        self.totals[stage] = total.to(norm.device) + norm, num_values + output.numel()

    def add_range(self, stage: str, module: nn.Module, output: torch.Tensor) -> None:
        channel = channel_dim(output)
        others = [dim for dim in range(output.ndim) if dim != channel]
        measured = _Range(
            output.amin(others), output.amax(others), output.numel() // output.shape[channel]
        )
        ranges = self.ranges.setdefault(stage, {})
        # A batch may come in parts, and a module be called several times.
        known = ranges.get((module, output.shape[channel]))
        if known is not None:
            measured.lowest = torch.minimum(known.lowest, measured.lowest)
            measured.highest = torch.maximum(known.highest, measured.highest)
            measured.num_values += known.num_values
        ranges[module, output.shape[channel]] = measured

    def mean_activation(self, stage: str) -> float:
        total, num_values = self.totals[stage]
        return float(total) / num_values

    def first_nonfinite(self) -> str | None:
        """The first stage whose output had NaN or infinite values."""
        return next(
            (stage for stage in self.totals if not math.isfinite(self.mean_activation(stage))), None
        )

    def dead_fraction(self, stage: Stage) -> float | None:
        """The share of units never above zero or, without ReLU-like modules, constant."""
        num_dead = num_units = 0
        for units in self.ranges.get(stage.name, {}).values():
            if units.num_values >= _MIN_VALUES:
                is_constant = units.highest == units.lowest
                is_dead = units.highest <= 0 if stage.activations else is_constant
                num_dead += int(is_dead.sum())
                num_units += len(is_dead)
        return num_dead / num_units if num_units else None


class LayerStats:
    """Writes the stages' statistics to TensorBoard; warns once of each kind of trouble."""

    def __init__(
        self, backbone: Backbone, freezing: Freezing, backbone_lr: float, monitor: Monitor
    ) -> None:
        self._stages = _find_stages(backbone, freezing)
        self._backbone_lr = backbone_lr
        self._monitor = monitor
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def watch(self, progress: Progress) -> Iterator[Callable[[], None]]:
        """Around a gradient step; gives a function to call before the optimizer steps."""
        if progress.batch and progress.step % _EVERY:
            yield lambda: None
            return
        stats = _BatchStats()
        watched = [stage for stage in self._stages if stage.trainable]
        with contextlib.ExitStack() as hooks:
            for stage in watched:
                _place_hooks(stage, stats, hooks)

            def read_gradients() -> None:
                hooks.close()
                for stage in watched:
                    gradients = [
                        parameter.grad
                        for parameter in stage.trainable
                        if parameter.grad is not None
                    ]
                    if gradients:
                        stats.gradients[stage.name] = float(nn.utils.get_total_norm(gradients))
                    stats.before[stage.name] = _sample_weights(stage)

            yield read_gradients
        self._report(watched, stats, progress)

    def find_first_nonfinite(self, compute_gradients: Callable[[], object]) -> str:
        """`; …` with the first stage of NaN or infinite output, else of such gradients."""
        stats = _BatchStats()
        watched = [stage for stage in self._stages if stage.trainable]
        with contextlib.ExitStack() as hooks:
            for stage in watched:
                _place_hooks(stage, stats, hooks)
            compute_gradients()
        broken = stats.first_nonfinite()
        if broken is not None:
            return f"; the first stage whose output is NaN or infinite is {broken}"
        for stage in reversed(watched):
            if any(
                parameter.grad is not None and not parameter.grad.isfinite().all()
                for parameter in stage.trainable
            ):
                return (
                    f"; in the backward pass, gradients are first NaN or infinite in {stage.name}"
                )
        return ""

    def _report(self, watched: list[Stage], stats: _BatchStats, progress: Progress) -> None:
        dead = {
            stage.name: fraction
            for stage in watched
            if (fraction := stats.dead_fraction(stage)) is not None
        }
        curves: dict[str, dict[str, float]] = {
            "activation": {name: stats.mean_activation(name) for name in stats.totals},
            "dead": dead,
            "gradient": stats.gradients,
            "update": {},
        }
        for stage in watched:
            before = stats.before.get(stage.name)
            if before is not None and (size := float(before.norm())):
                curves["update"][stage.name] = (
                    float((_sample_weights(stage) - before).norm()) / size
                )
        for kind, values in curves.items():
            for name, value in values.items():
                self._monitor.scalar(f"inside_{kind}/{name}", value, progress.step)
        broken = stats.first_nonfinite()
        if broken is not None:
            self._warn(
                "broken",
                f"the first stage whose output is NaN or infinite is {broken}, though the loss is "
                f"finite; lower --backbone-lr (now {self._backbone_lr:.1e}), or say --precision "
                "fp32",
                progress,
            )
        self._warn_of_dead(dead, progress)
        self._warn_of_spread(stats.gradients, progress)

    def _warn_of_dead(self, dead: dict[str, float], progress: Progress) -> None:
        if not dead:
            return
        worst = max(dead, key=lambda name: dead[name])
        if dead[worst] > _MAX_DEAD_FRACTION:
            remedy = (
                "they were so before the first step: do the weights belong to this network, and "
                "the images to these weights?"
                if progress.step == 0
                else f"lower --backbone-lr, to a tenth for a start (now {self._backbone_lr:.1e})"
            )
            message = (
                f"{dead[worst]:.0%} of the units of {worst} are dead: their output is zero for "
                f"all images of a batch; {remedy}"
            )
            self._warn("dead", message, progress)

    def _warn_of_spread(self, gradients: dict[str, float], progress: Progress) -> None:
        # A head of zeros, and stages before units that are all dead, have no gradient.
        norms = {name: norm for name, norm in gradients.items() if norm > 0}
        if len(norms) < 2:
            return
        weakest = min(norms, key=lambda name: norms[name])
        strongest = max(norms, key=lambda name: norms[name])
        if norms[strongest] / norms[weakest] > _MAX_GRADIENT_SPREAD:
            order = list(norms)
            explode = order.index(strongest) < order.index(weakest)
            remedy = (
                f"lower --backbone-lr (now {self._backbone_lr:.1e})"
                if explode
                else f"freeze it: --freeze until:{weakest}"
            )
            self._warn(
                "spread",
                f"gradients {'explode' if explode else 'vanish'} in the backward pass: "
                f"{norms[strongest]:.1e} in {strongest}, {norms[weakest]:.1e} in {weakest}; "
                f"{remedy}, or put norms or skip connections into a network of your own",
                progress,
            )

    def _warn(self, kind: str, message: str, progress: Progress) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(
                "epoch %d, step %d: %s (TensorBoard: inside_*)",
                progress.epoch,
                progress.step,
                message,
            )


def channel_dim(output: torch.Tensor) -> int:
    """The units' dimension of `[B,C]`, `[B,C,H,W]`, `[B,N,C]`, or `[B,H,W,C]` with H = W ≠ C."""
    is_last = output.ndim == 3 or (
        output.ndim == 4 and output.shape[1] == output.shape[2] != output.shape[3]
    )
    return output.ndim - 1 if is_last else 1


def _find_stages(backbone: Backbone, freezing: Freezing) -> list[Stage]:
    """The stages that `--freeze until:NAME` offers, and the head, in the network's order."""
    model, prefix = backbone.model, backbone.module_prefix
    names = [prefix + name for name in stages(model, backbone.classifier, prefix)]
    activations: dict[str, list[nn.Module]] = {name: [] for name in names}
    last = None
    for name, module in model.named_modules():
        last = next(
            (stage for stage in names if name == stage or name.startswith(f"{stage}.")), last
        )
        # Frozen modules may return placeholders (finetune/training/boundary.py).
        if (
            last is not None
            and type(module).__name__ in _RELU_LIKE
            and name not in freezing.frozen_modules
        ):
            activations[last].append(module)
    found = [
        Stage(name.removeprefix(prefix), model.get_submodule(name), tuple(activations[name]), False)
        for name in names
    ]
    return [*found, Stage(backbone.classifier, backbone.head, (), True)]


def _place_hooks(stage: Stage, stats: _BatchStats, hooks: contextlib.ExitStack) -> None:
    def measure_output(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim > 1:
            stats.add_total(stage.name, output.detach())
            if not stage.activations and not stage.is_head:
                stats.add_range(stage.name, module, output.detach())

    def measure_activation(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim > 1:
            stats.add_range(stage.name, module, output.detach())

    hooks.callback(stage.module.register_forward_hook(measure_output).remove)
    for module in stage.activations:
        hooks.callback(module.register_forward_hook(measure_activation).remove)


def _sample_weights(stage: Stage) -> torch.Tensor:
    """A copy of some of the stage's weights `[N]`, always the same ones."""
    parameters = stage.trainable
    stride = max(1, sum(parameter.numel() for parameter in parameters) // _NUM_WEIGHTS)
    return torch.cat([parameter.detach().reshape(-1)[::stride] for parameter in parameters]).float()
