"""A look inside a network while it trains: what its stages give, what comes back to them, and how far each step moves them.

On the first batch of an epoch and on every fiftieth, hooks read the activations on their way; on all others there are none. Nothing is
changed and no random number is drawn, so that a run with looks is bit by bit the run without.
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

from finetune.config import Options
from finetune.monitor import Monitor
from finetune.training.state import Progress
from models.backbone.build import Backbone
from models.backbone.freezing import Freezing, stages

logger = logging.getLogger("graft.inside")

_EVERY = 50
# Of a stage's units; and values of a unit that a look must have seen before it may call it dead.
_MAX_DEAD_FRACTION = 0.5
_MIN_VALUES = 64
_MAX_GRADIENT_SPREAD = 1e4
# Of a stage's weights, evenly spread, those that a step's length is measured on: a copy of all might be what memory has no room for.
_NUM_WEIGHTS = 100_000
# torch's classes and timm's: units whose output stays at or below zero pass on nothing, or next to nothing.
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
    """A part of the network that has a name, with the ReLU-like modules in it or directly behind it."""

    name: str
    module: nn.Module
    activations: tuple[nn.Module, ...]
    is_head: bool

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


@dataclass
class _Range:
    """Of each unit `[C]` the lowest and highest value yet, of so many."""

    lowest: torch.Tensor
    highest: torch.Tensor
    num_values: int


@dataclass
class _Look:
    """What was seen of one batch; `totals` are of |activation| with the number of values, in the order in which stages came."""

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
        found = _Range(
            output.amin(others), output.amax(others), output.numel() // output.shape[channel]
        )
        ranges = self.ranges.setdefault(stage, {})
        # A batch may come in parts, and a module be called several times.
        known = ranges.get((module, output.shape[channel]))
        if known is not None:
            found.lowest, found.highest = (
                torch.minimum(known.lowest, found.lowest),
                torch.maximum(known.highest, found.highest),
            )
            found.num_values += known.num_values
        ranges[module, output.shape[channel]] = found

    def mean_activation(self, stage: str) -> float:
        total, num_values = self.totals[stage]
        return float(total) / num_values

    def first_broken(self) -> str | None:
        """The stage that gave NaN or infinity before any other did."""
        return next(
            (stage for stage in self.totals if not math.isfinite(self.mean_activation(stage))), None
        )

    def dead_fraction(self, stage: Stage) -> float | None:
        """Of the stage's units, those at or below zero throughout; without ReLU-like modules, those that never change."""
        num_dead = num_units = 0
        for seen in self.ranges.get(stage.name, {}).values():
            if seen.num_values >= _MIN_VALUES:
                is_dead = seen.highest <= 0 if stage.activations else seen.highest == seen.lowest
                num_dead += int(is_dead.sum())
                num_units += len(is_dead)
        return num_dead / num_units if num_units else None


class Inside:
    """The stages of a network in training; what is seen of them goes to TensorBoard, and what is wrong is said once, with the remedy."""

    def __init__(
        self, backbone: Backbone, freezing: Freezing, options: Options, monitor: Monitor
    ) -> None:
        self._stages = _find_stages(backbone, freezing)
        self._options = options
        self._monitor = monitor
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def watch(self, at: Progress) -> Iterator[Callable[[], None]]:
        """Round a gradient step; gives a function to call between the backward pass and the optimizer."""
        if at.batch and at.step % _EVERY:
            yield lambda: None
            return
        look = _Look()
        watched = [stage for stage in self._stages if stage.trainable]
        with contextlib.ExitStack() as hooks:
            for stage in watched:
                _place_hooks(stage, look, hooks)

            def see_gradients() -> None:
                hooks.close()
                for stage in watched:
                    gradients = [
                        parameter.grad
                        for parameter in stage.trainable
                        if parameter.grad is not None
                    ]
                    if gradients:
                        look.gradients[stage.name] = float(nn.utils.get_total_norm(gradients))
                    look.before[stage.name] = _sample_weights(stage)

            yield see_gradients
        self._tell(watched, look, at)

    def find_broken(self, learn: Callable[[], object]) -> str:
        """`; …` with the first stage whose output is no number, else the last whose gradient is none, when `learn` makes gradients."""
        look = _Look()
        watched = [stage for stage in self._stages if stage.trainable]
        with contextlib.ExitStack() as hooks:
            for stage in watched:
                _place_hooks(stage, look, hooks)
            learn()
        broken = look.first_broken()
        if broken is not None:
            return f"; the first stage that gives values which are no numbers is {broken}"
        for stage in reversed(watched):
            if any(
                parameter.grad is not None and not parameter.grad.isfinite().all()
                for parameter in stage.trainable
            ):
                return f"; on the way back, gradients are first no numbers in {stage.name}"
        return ""

    def _tell(self, watched: list[Stage], look: _Look, at: Progress) -> None:
        dead = {
            stage.name: fraction
            for stage in watched
            if (fraction := look.dead_fraction(stage)) is not None
        }
        curves: dict[str, dict[str, float]] = {
            "activation": {name: look.mean_activation(name) for name in look.totals},
            "dead": dead,
            "gradient": look.gradients,
            "update": {},
        }
        for stage in watched:
            before = look.before.get(stage.name)
            if before is not None and (size := float(before.norm())):
                curves["update"][stage.name] = (
                    float((_sample_weights(stage) - before).norm()) / size
                )
        for kind, values in curves.items():
            for name, value in values.items():
                self._monitor.scalar(f"inside_{kind}/{name}", value, at.step)
        broken = look.first_broken()
        if broken is not None:
            remedy = f"lower --backbone-lr (now {self._options.backbone_lr:.1e}), or say --precision fp32"
            self._warn(
                "broken",
                f"the first stage that gives values which are no numbers is {broken}, though the loss is one; {remedy}",
                at,
            )
        self._warn_of_dead(dead, at)
        self._warn_of_spread(look.gradients, at)

    def _warn_of_dead(self, dead: dict[str, float], at: Progress) -> None:
        if not dead:
            return
        worst = max(dead, key=lambda name: dead[name])
        if dead[worst] > _MAX_DEAD_FRACTION:
            remedy = (
                "they were so before the first step: do the weights belong to this network, and the images to these weights?"
                if at.step == 0
                else f"lower --backbone-lr, to a tenth for a start (now {self._options.backbone_lr:.1e})"
            )
            message = f"{dead[worst]:.0%} of the units of {worst} are dead: they give nothing for any image of a batch; {remedy}"
            self._warn("dead", message, at)

    def _warn_of_spread(self, gradients: dict[str, float], at: Progress) -> None:
        # A head of zeros, and the stages behind units that are all dead, have no gradient; the others tell more.
        norms = {name: norm for name, norm in gradients.items() if norm > 0}
        if len(norms) < 2:
            return
        weakest, strongest = (
            min(norms, key=lambda name: norms[name]),
            max(norms, key=lambda name: norms[name]),
        )
        if norms[strongest] / norms[weakest] > _MAX_GRADIENT_SPREAD:
            order = list(norms)
            grows_back = order.index(strongest) < order.index(weakest)
            remedy = (
                f"lower --backbone-lr (now {self._options.backbone_lr:.1e})"
                if grows_back
                else f"freeze it: --freeze until:{weakest}"
            )
            self._warn(
                "spread",
                f"gradients {'explode' if grows_back else 'vanish'} on their way back: {norms[strongest]:.1e} in {strongest}, "
                f"{norms[weakest]:.1e} in {weakest}; {remedy}, or put norms or skip connections into a network of your own",
                at,
            )

    def _warn(self, kind: str, message: str, at: Progress) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(
                "epoch %d, step %d: %s (TensorBoard: inside_*)", at.epoch, at.step, message
            )


def channel_dim(output: torch.Tensor) -> int:
    """Where an output's units are: `[B,C]`, `[B,C,H,W]`, `[B,N,C]`, and `[B,H,W,C]` where H and W are the same and C is another."""
    is_last = output.ndim == 3 or (
        output.ndim == 4 and output.shape[1] == output.shape[2] != output.shape[3]
    )
    return output.ndim - 1 if is_last else 1


def _find_stages(backbone: Backbone, freezing: Freezing) -> list[Stage]:
    """Those that `--freeze until:NAME` offers, and the head, in the network's order."""
    model, prefix = backbone.model, backbone.module_prefix
    names = [prefix + name for name in stages(model, backbone.classifier, prefix)]
    activations: dict[str, list[nn.Module]] = {name: [] for name in names}
    last = None
    for name, module in model.named_modules():
        last = next(
            (stage for stage in names if name == stage or name.startswith(f"{stage}.")), last
        )
        # Frozen ones may only pretend (finetune/training/boundary.py).
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


def _place_hooks(stage: Stage, look: _Look, hooks: contextlib.ExitStack) -> None:
    def see_output(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim > 1:
            look.add_total(stage.name, output.detach())
            if not stage.activations and not stage.is_head:
                look.add_range(stage.name, module, output.detach())

    def see_activation(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim > 1:
            look.add_range(stage.name, module, output.detach())

    hooks.callback(stage.module.register_forward_hook(see_output).remove)
    for module in stage.activations:
        hooks.callback(module.register_forward_hook(see_activation).remove)


def _sample_weights(stage: Stage) -> torch.Tensor:
    """Some of the stage's weights `[N]`, always the same ones, copied."""
    parameters = stage.trainable
    stride = max(1, sum(parameter.numel() for parameter in parameters) // _NUM_WEIGHTS)
    return torch.cat([parameter.detach().reshape(-1)[::stride] for parameter in parameters]).float()
