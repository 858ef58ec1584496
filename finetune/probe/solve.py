"""Solve the head on features of a frozen backbone: multinomial logistic regression, its strength of regularisation by cross-validation.

Labels are `[N]`, or `[N,C]` of 0 and 1 in multi-label data: then it is a logistic regression for each label, independent of the others.

Full-batch L-BFGS (Nocedal & Wright, Numerical Optimization, algorithm 7.5) runs all folds in lockstep, so that one matrix product serves
them all, and starts each strength of the path where the one before ended.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from finetune.tasks.strata import NUM_FOLDS, assign_class_folds, stratify_folds
from models.engine.engine import Features
from models.scores import Floats, Labels, sigmoid, softmax

logger = logging.getLogger("graft.probe")
# From strong to weak, on standardised features. The path ends early once two weaker ones in a row validate worse.
L2_PATH = tuple(10.0 ** (half / 2) for half in range(0, -11, -1))
_MEMORY = 6
_MAX_STEPS = 100
# A step that lowers the loss by less than this share of it ends the solve: 1e-5 moves no prediction.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Probe:
    """A solved head: weight `[C,F]`, bias `[C]`, and what cross-validation on the training split alone said of it.

    `out_of_fold_logits` `[N,C]` come from the folds' heads, each sample's from the one that did not train on it. `num_views` is of each
    image, among what it was solved on, and `class_weights` `[C]` say how much an image of each class counted there, where not the same.
    """

    weight: Floats
    bias: Floats
    l2: float
    out_of_fold_logits: Floats
    temperature: float
    num_views: int = 1
    class_weights: Floats | None = None

    def logits(self, features: Features) -> Floats:
        """Features `[B,F]` → logits `[B,C]`, before temperature."""
        return np.asarray(features @ self.weight.T + self.bias, np.float32)


def solve_probe(
    features: Features,
    labels: Labels,
    num_classes: int,
    *,
    seed: int,
    num_views: int = 1,
    class_weights: Floats | None = None,
    l2_path: tuple[float, ...] = L2_PATH,
) -> Probe:
    """Fit `features` `float32 [N,F]` to `labels` `[N]` or `[N,C]`: choose L2 by cross-validated log loss, then refit on all of them.

    With `num_views` V, `features` are `[V·N,F]`: all images in their first, plain view, then all in their second, and so on. An
    image's views are never on both sides of a fold, and only plain views are predicted. `class_weights` `[C]` weigh the loss, also the
    one that chooses; the temperature is fitted to the images as they come.
    """
    assert len(features) == num_views * len(labels)
    scaling = _Scaling.of(features)
    folds = _assign_folds(labels, seed)
    num_folds = int(folds.max()) + 1
    all_labels, plain = np.concatenate([labels] * num_views), features[: len(labels)]
    weights = _image_weights(all_labels, class_weights)
    in_training = (
        np.tile(
            np.stack([folds != fold for fold in range(num_folds)]).astype(np.float32), num_views
        )
        * weights
    )
    solution = np.zeros((num_folds, features.shape[1] + 1, num_classes), np.float32)
    best_loss, best = (
        np.inf,
        (l2_path[0], solution, np.zeros((len(labels), num_classes), np.float32)),
    )
    num_worse = 0
    for l2 in l2_path:
        solution = _minimise(features, all_labels, in_training, l2, scaling, solution)
        held_out = _held_out_logits(plain, scaling, solution, folds)
        loss = log_loss(held_out, labels, class_weights)
        if loss < best_loss:
            best_loss, best, num_worse = loss, (l2, solution, held_out), 0
        else:
            num_worse += 1
            if num_worse == 2:
                break
    l2, solution, held_out = best
    start = solution.mean(axis=0, keepdims=True)
    weight, bias = scaling.fold_in(
        _minimise(features, all_labels, weights[None], l2, scaling, start)[0]
    )
    temperature = fit_temperature(held_out, labels)
    return Probe(
        np.ascontiguousarray(weight.T), bias, l2, held_out, temperature, num_views, class_weights
    )


def solve_on_best_views(
    features: Features,
    labels: Labels,
    num_classes: int,
    *,
    seed: int,
    class_weights: Floats | None = None,
) -> Probe:
    """`solve_probe` on all views in `features` `[V·N,F]`, or on the plain ones alone where cross-validation finds that as good."""
    num_views = len(features) // max(1, len(labels))
    plain = solve_probe(
        features[: len(labels)], labels, num_classes, seed=seed, class_weights=class_weights
    )
    if num_views == 1:
        return plain
    augmented = solve_probe(
        features, labels, num_classes, seed=seed, num_views=num_views, class_weights=class_weights
    )
    losses = [
        log_loss(probe.out_of_fold_logits, labels, class_weights) for probe in (plain, augmented)
    ]
    helps = losses[1] < losses[0]
    verdict = "they help" if helps else "they do not help, and the plain crop alone is used"
    logger.info(
        "%d views: out-of-fold log loss %.4f, without %.4f: %s",
        num_views,
        losses[1],
        losses[0],
        verdict,
    )
    return augmented if helps else plain


def solve_head(
    features: Features,
    labels: Labels,
    num_classes: int,
    l2: float,
    start: tuple[Floats, Floats] | None = None,
    class_weights: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Weight `[C,F]` and bias `[C]` for `features` `[N,F]` at one strength; `start`, the head of similar features, saves steps.

    `class_weights` `[C]` weigh the loss.
    """
    scaling = _Scaling.of(features)
    solution = np.zeros((1, features.shape[1] + 1, num_classes), np.float32)
    if start is not None:
        weight, bias = start
        solution[0, :-1] = weight.T * np.where(np.isinf(scaling.scale), 0, scaling.scale)[:, None]
        solution[0, -1] = bias + weight @ scaling.mean
    everything = _image_weights(labels, class_weights)[None]
    solved, bias = scaling.fold_in(
        _minimise(features, labels, everything, l2, scaling, solution)[0]
    )
    return np.ascontiguousarray(solved.T), bias


def soften(probe: Probe, features: Features, labels: Labels, num_classes: int) -> Probe:
    """The same but for its head, solved on `features` `[N,F]` at the strongest L2 of the path: one to begin gradient epochs with.

    The best head on frozen features fits its images so well, with such large weights, that the first steps spoil what they rest on and
    little is left to learn. From the soft one 5 epochs led to 0.989 and 1.000 on the digits and 0.861 on the emoji, from the probe's to
    0.986 and 0.840.
    """
    weight, bias = solve_head(
        features, labels, num_classes, max(L2_PATH), class_weights=probe.class_weights
    )
    return replace(probe, weight=weight, bias=bias)


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature that minimises log loss (Guo et al., arXiv 1706.04599): Newton's method on its inverse, where it is convex."""
    inverse = 1.0
    rows = np.arange(len(labels))
    for _ in range(50):
        if labels.ndim == 2:
            probabilities = sigmoid(logits * np.float32(inverse))
            slope = float(((probabilities - labels) * logits).mean())
            curvature = float((probabilities * (1 - probabilities) * logits**2).mean())
        else:
            probabilities = softmax(logits * inverse)
            expected = (probabilities * logits).sum(axis=1)
            slope = float((expected - logits[rows, labels]).mean())
            curvature = float(((probabilities * logits**2).sum(axis=1) - expected**2).mean())
        step = slope / max(curvature, 1e-12)
        inverse = float(np.clip(inverse - np.clip(step, -inverse / 2, inverse), 0.05, 20.0))
        if abs(step) < 1e-5 * inverse:
            break
    return 1.0 / inverse


def log_loss(logits: Floats, labels: Labels, class_weights: Floats | None = None) -> float:
    """Mean cross-entropy in nats of logits `[N,C]` against labels `[N]`, an image of a class counting as its weight of `[C]` says.

    Against labels `[N,C]`, the mean over images and labels; there are no weights then.
    """
    if labels.ndim == 2:
        return float((np.logaddexp(0, logits) - labels * logits).mean())
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return float(
        losses.mean()
        if class_weights is None
        else np.average(losses, weights=class_weights[labels])
    )


def _assign_folds(labels: Labels, seed: int) -> npt.NDArray[np.int64]:
    if labels.ndim == 2:
        return stratify_folds(labels, min(NUM_FOLDS, len(labels)), seed)
    return assign_class_folds(labels, NUM_FOLDS, seed)


def _image_weights(labels: Labels, class_weights: Floats | None) -> Floats:
    """How much each image of `labels` `[N]` counts, `[N]`."""
    return np.ones(len(labels), np.float32) if class_weights is None else class_weights[labels]


@dataclass(frozen=True)
class _Scaling:
    """Features are standardised inside the products, (X - mean) / scale · W = X · (W / scale) - …, so that no copy of them is made."""

    mean: Floats
    scale: Floats

    @classmethod
    def of(cls, features: Features) -> _Scaling:
        mean = features.mean(axis=0, dtype=np.float64)
        square = np.einsum("nf,nf->f", features, features, dtype=np.float64) / len(features)
        scale = np.sqrt(np.maximum(square - mean**2, 0))
        # A feature that hardly varies would be blown up to noise; one that varies by float32's rounding alone has no say at all.
        floored = np.maximum(scale, float(scale.mean()) * 1e-2)
        return cls(
            mean.astype(np.float32),
            np.where(scale <= 1e-5 * np.abs(mean), np.inf, floored).astype(np.float32),
        )

    def fold_in(self, solution: Floats) -> tuple[Floats, Floats]:
        """Weights `[…,F,C]` and biases `[…,C]` for features as they are, from a solution `[…,F+1,C]` for standardised ones."""
        weight = solution[..., :-1, :] / self.scale[:, None]
        return weight, solution[..., -1, :] - np.einsum("f,...fc->...c", self.mean, weight)


def _held_out_logits(
    features: Features, scaling: _Scaling, solution: Floats, folds: npt.NDArray[np.int64]
) -> Floats:
    weights, biases = scaling.fold_in(solution)
    logits = np.empty((len(features), solution.shape[2]), np.float32)
    for fold in range(len(solution)):
        logits[folds == fold] = features[folds == fold] @ weights[fold] + biases[fold]
    return logits


def _minimise(
    features: Features,
    labels: Labels,
    in_training: Floats,
    l2: float,
    scaling: _Scaling,
    start: Floats,
) -> Floats:
    """L-BFGS on K problems at once: `in_training` `[K,N]` says how much each counts each sample, 0 for none; solutions are `[K,F+1,C]`."""
    num_problems, size, num_classes = start.shape
    shares = in_training / in_training.sum(axis=1, keepdims=True)
    lose = _lose_by_softmax if labels.ndim == 1 else _lose_by_sigmoid

    def evaluate(points: Floats) -> tuple[Floats, Floats]:
        """Losses `[K]` and gradients `[K,D]` of flat points `[K,D]`."""
        unknowns = points.reshape(num_problems, size, num_classes)
        weights, biases = scaling.fold_in(unknowns)
        logits = (features @ weights.transpose(1, 0, 2).reshape(size - 1, -1)).reshape(
            len(labels), num_problems, num_classes
        )
        logits += biases
        losses = lose(logits, labels, shares)
        residual = logits.sum(axis=0)
        products = (
            (features.T @ logits.reshape(len(labels), -1))
            .reshape(size - 1, num_problems, num_classes)
            .transpose(1, 0, 2)
        )
        gradients = np.empty_like(unknowns)
        gradients[:, :-1] = (products - scaling.mean[:, None] * residual[:, None]) / scaling.scale[
            :, None
        ] + l2 * unknowns[:, :-1]
        gradients[:, -1] = residual
        losses = losses + 0.5 * l2 * np.square(unknowns[:, :-1]).sum(axis=(1, 2))
        return losses, gradients.reshape(num_problems, -1)

    points = start.reshape(num_problems, -1).copy()
    losses, gradients = evaluate(points)
    history: list[tuple[Floats, Floats, Floats]] = []
    is_done = np.zeros(num_problems, bool)
    for _ in range(_MAX_STEPS):
        directions = _direction(gradients, history)
        slopes = np.einsum("kd,kd->k", directions, gradients)
        uphill = slopes >= 0
        directions[uphill] = -gradients[uphill]
        slopes[uphill] = -np.square(gradients[uphill]).sum(axis=1)
        steps = np.ones(num_problems, np.float32)
        if not history:
            steps /= np.maximum(np.linalg.norm(gradients, axis=1), 1.0)
        steps[is_done] = 0
        for _ in range(12):
            new_points = points + steps[:, None] * directions
            new_losses, new_gradients = evaluate(new_points)
            too_long = new_losses > losses + 1e-4 * steps * slopes
            if not (too_long & ~is_done).any():
                break
            steps = np.where(too_long & ~is_done, steps / 2, steps).astype(np.float32)
        else:
            # float32 cannot lower these any further.
            stuck = too_long & ~is_done
            new_points[stuck], new_losses[stuck], new_gradients[stuck] = (
                points[stuck],
                losses[stuck],
                gradients[stuck],
            )
        moved, turned = new_points - points, new_gradients - gradients
        curvature = np.einsum("kd,kd->k", moved, turned)
        history = [
            *history[1 - _MEMORY :],
            (moved, turned, np.where(curvature > 1e-10, 1 / np.maximum(curvature, 1e-10), 0)),
        ]
        is_done |= losses - new_losses <= _TOLERANCE * np.abs(losses)
        points, losses, gradients = new_points, new_losses, new_gradients
        if is_done.all():
            break
    return points.reshape(num_problems, size, num_classes)


def _lose_by_softmax(logits: Floats, labels: Labels, shares: Floats) -> Floats:
    """Losses `[K]` of logits `[N,K,C]`, weighted by shares `[K,N]`; the logits become the gradient by themselves."""
    rows = np.arange(len(labels))
    logits -= logits.max(axis=2, keepdims=True)
    chosen = logits[rows, :, labels]
    np.exp(logits, out=logits)
    sums = logits.sum(axis=2)
    losses: Floats = ((np.log(sums) - chosen) * shares.T).sum(axis=0)
    logits *= (shares.T / sums)[:, :, None]
    logits[rows, :, labels] -= shares.T
    return losses


def _lose_by_sigmoid(logits: Floats, labels: Labels, shares: Floats) -> Floats:
    """The same for labels `[N,C]`, summed over the labels, so that each is a regression of its own."""
    targets = labels[:, None, :].astype(np.float32)
    losses: Floats = (
        (np.logaddexp(np.float32(0), logits) - targets * logits).sum(axis=2) * shares.T
    ).sum(axis=0)
    logits[:] = (sigmoid(logits) - targets) * shares.T[:, :, None]
    return losses


def _direction(gradients: Floats, history: list[tuple[Floats, Floats, Floats]]) -> Floats:
    """The two-loop recursion, for each problem by itself; pairs without curvature (rho 0) drop out."""
    direction = -gradients
    alphas = []
    for moved, turned, rho in reversed(history):
        alpha = rho * np.einsum("kd,kd->k", moved, direction)
        direction = direction - alpha[:, None] * turned
        alphas.append(alpha)
    if history:
        moved, turned, rho = history[-1]
        norms = np.square(turned).sum(axis=1)
        direction *= np.where(rho > 0, 1 / np.maximum(rho * norms, 1e-12), 1.0)[:, None]
    for (moved, turned, rho), alpha in zip(history, reversed(alphas), strict=True):
        beta = rho * np.einsum("kd,kd->k", turned, direction)
        direction = direction + (alpha - beta)[:, None] * moved
    return np.asarray(direction, np.float32)


@dataclass(frozen=True)
class Head:
    """The head to publish: weight `[C,F]` and bias `[C]`."""

    weight: Floats
    bias: Floats
