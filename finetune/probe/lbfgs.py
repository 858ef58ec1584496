"""Regularised logistic regressions on the same features, minimised together by L-BFGS.

Full-batch L-BFGS (Nocedal & Wright, Numerical Optimization, algorithm 7.5) runs all problems in
lockstep, so that one matrix product serves them all. docs/finetune-benchmark.md compares it with
SciPy and scikit-learn.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from finetune.probe.scaling import Scaling
from finetune.tasks.single_label import SINGLE_LABEL
from finetune.tasks.task import Task
from models.engine.engine import Features
from models.scores import Floats, Labels

_MEMORY = 6
_MAX_STEPS = 100
_MAX_HALVINGS = 12
# A step that lowers the loss by less than this part of it is the last: 1e-5 moves no prediction.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Objective:
    """K regularised logistic regressions on the same features, as a function of flat points.

    `in_training` `[K,N]` says how much each problem counts each sample, 0 for not at all. A point
    `[(F+1)*C]` holds the weights and the bias for standardised features.
    """

    features: Features
    labels: Labels
    in_training: Floats
    l2: float
    scaling: Scaling
    num_classes: int
    task: Task = SINGLE_LABEL

    @functools.cached_property
    def _shares(self) -> Floats:
        shares: Floats = self.in_training / self.in_training.sum(axis=1, keepdims=True)
        return shares

    def evaluate(self, points: Floats) -> tuple[Floats, Floats]:
        """Losses `[K]` and gradients `[K,D]` at `points` `[K,D]`; one product serves all K."""
        num_images, size = self.features.shape[0], self.features.shape[1] + 1
        num_problems = len(points)
        unknowns = points.reshape(num_problems, size, self.num_classes)
        weights, biases = self.scaling.fold_in(unknowns)
        flat_weights = weights.transpose(1, 0, 2).reshape(size - 1, -1)
        logits = (self.features @ flat_weights).reshape(num_images, num_problems, self.num_classes)
        logits += biases
        losses = self.task.loss_and_gradient(logits, self.labels, self._shares)
        residual = logits.sum(axis=0)
        products = (
            (self.features.T @ logits.reshape(num_images, -1))
            .reshape(size - 1, num_problems, self.num_classes)
            .transpose(1, 0, 2)
        )
        centred = products - self.scaling.mean[:, None] * residual[:, None]
        gradients = np.empty_like(unknowns)
        gradients[:, :-1] = centred / self.scaling.scale[:, None] + self.l2 * unknowns[:, :-1]
        gradients[:, -1] = residual
        losses = losses + 0.5 * self.l2 * np.square(unknowns[:, :-1]).sum(axis=(1, 2))
        return losses, gradients.reshape(num_problems, -1)


def minimise(objective: Objective, start: Floats, tolerance: float = TOLERANCE) -> Floats:
    """Solutions `[K,F+1,C]` by L-BFGS on all K problems in lockstep, from `start` `[K,F+1,C]`.

    A step that lowers the loss by less than `tolerance` of it is the last.
    """
    points = start.reshape(len(start), -1).copy()
    losses, gradients = objective.evaluate(points)
    history: list[_Update] = []
    is_done = np.zeros(len(points), bool)
    for _ in range(_MAX_STEPS):
        directions, slopes = _descend(gradients, history)
        steps = np.ones(len(points), np.float32)
        if not history:
            steps /= np.maximum(np.linalg.norm(gradients, axis=1), 1.0)
        steps[is_done] = 0
        for _ in range(_MAX_HALVINGS):
            new_points = points + steps[:, None] * directions
            new_losses, new_gradients = objective.evaluate(new_points)
            is_too_long = (new_losses > losses + 1e-4 * steps * slopes) & ~is_done
            if not is_too_long.any():
                break
            steps = np.where(is_too_long, steps / 2, steps).astype(np.float32)
        else:
            # float32 cannot lower these any further.
            new_points[is_too_long] = points[is_too_long]
            new_losses[is_too_long] = losses[is_too_long]
            new_gradients[is_too_long] = gradients[is_too_long]
        update = _Update.of(new_points - points, new_gradients - gradients)
        history = [*history[1 - _MEMORY :], update]
        is_done |= losses - new_losses <= tolerance * np.abs(losses)
        points, losses, gradients = new_points, new_losses, new_gradients
        if is_done.all():
            break
    return points.reshape(start.shape)


@dataclass(frozen=True)
class _Update:
    """One update of each problem, `[K,D]`: step s, gradient change y; `rho` `[K]` is 1 / (s·y)."""

    step: Floats
    gradient_change: Floats
    rho: Floats

    @classmethod
    def of(cls, step: Floats, gradient_change: Floats) -> _Update:
        """`rho` is 0, so that the update drops out, where the curvature is not positive."""
        curvature = np.einsum("kd,kd->k", step, gradient_change)
        rho = np.where(curvature > 1e-10, 1 / np.maximum(curvature, 1e-10), 0)
        return cls(step, gradient_change, rho)


def _descend(gradients: Floats, history: list[_Update]) -> tuple[Floats, Floats]:
    """Directions `[K,D]` and the slopes `[K]` along them; the gradient's where they lead uphill."""
    directions = _direction(gradients, history)
    slopes = np.einsum("kd,kd->k", directions, gradients)
    is_uphill = slopes >= 0
    directions[is_uphill] = -gradients[is_uphill]
    slopes[is_uphill] = -np.square(gradients[is_uphill]).sum(axis=1)
    return directions, slopes


def _direction(gradients: Floats, history: list[_Update]) -> Floats:
    """The two-loop recursion for each problem by itself."""
    direction = -gradients
    alphas = []
    for update in reversed(history):
        alpha = update.rho * np.einsum("kd,kd->k", update.step, direction)
        direction = direction - alpha[:, None] * update.gradient_change
        alphas.append(alpha)
    if history:
        last = history[-1]
        norms = np.square(last.gradient_change).sum(axis=1)
        scales = np.where(last.rho > 0, 1 / np.maximum(last.rho * norms, 1e-12), 1.0)
        direction *= scales[:, None]
    for update, alpha in zip(history, reversed(alphas), strict=True):
        beta = update.rho * np.einsum("kd,kd->k", update.gradient_change, direction)
        direction = direction + (alpha - beta)[:, None] * update.step
    return np.asarray(direction, np.float32)
