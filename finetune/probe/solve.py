"""Solve the head on features of a frozen backbone: logistic regression, L2 by cross-validation.

Labels are what the task encodes: `[N]`, or `[N,C]` of 0 and 1; then each label is a regression of
its own.

Full-batch L-BFGS (Nocedal & Wright, Numerical Optimization, algorithm 7.5) runs all folds in
lockstep, so that one matrix product serves them all, and starts each strength of the path where
the one before ended. Where features outnumber images, their coordinates in the span of the images
are solved on, which is the same problem. docs/finetune-benchmark.md compares it with SciPy and
scikit-learn.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from finetune.tasks.single_label import SINGLE_LABEL
from finetune.tasks.strata import NUM_FOLDS
from finetune.tasks.task import Task
from models.engine.engine import Features
from models.scores import Floats, Labels

logger = logging.getLogger("graft.probe")
# From strong to weak, on standardised features. The path ends early where two in a row validate
# worse than the best before them.
L2_PATH = tuple(10.0 ** (half / 2) for half in range(0, -11, -1))
_MEMORY = 6
_MAX_STEPS = 100
_MAX_HALVINGS = 12
# A step that lowers the loss by less than this part of it is the last: 1e-5 moves no prediction.
_TOLERANCE = 1e-5
# Where strengths or sets of features are compared: it moves out-of-fold losses by a few percent.
ROUGH_TOLERANCE = 1e-3
# Of at least twice as many images, so many find where on the path the best L2 lies.
_MAX_SEARCHED = 2000
# Of so many times as many features as images, the coordinates in the images' span save more time
# than they take.
_WORTH_A_SPAN = 1.5
# A part of an image's own square norm, and what keeps images without any apart.
_OWN_COORDINATE, _TINY = 1e-5, 1e-12


@dataclass(frozen=True)
class Probe:
    """A solved head, weight `[C,F]` and bias `[C]`, cross-validated on the training split.

    `out_of_fold_logits` `[N,C]`: each sample's come from the head of the fold that left it out.
    `num_views` of each image were solved on. `class_weights` `[C]`, if any, are how much an image
    of each class counted.
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
        return self.head.logits(features)

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias)


def solve_probe(
    features: Features,
    labels: Labels,
    num_classes: int,
    *,
    task: Task = SINGLE_LABEL,
    seed: int,
    num_views: int = 1,
    class_weights: Floats | None = None,
    l2_path: tuple[float, ...] = L2_PATH,
    tolerance: float = _TOLERANCE,
) -> Probe:
    """Fit `features` `float32 [N,F]` to the labels of a task, with L2 by cross-validation.

    Of many images a part finds where on the path the best L2 lies, and all of them are solved on
    from there: more images never want a stronger one by much.

    With `num_views` V, `features` are `[V·N,F]`: all images in their first, plain view, then all in
    their second, and so on. All views of an image are in one fold, and only plain views are
    predicted. `class_weights` `[C]` weigh the loss, also the one that chooses L2, but not the one
    that the temperature is fitted by. `tolerance` is `minimise`'s.
    """
    assert len(features) == num_views * len(labels)
    assign = functools.partial(task.assign_folds, num_folds=NUM_FOLDS, seed=seed)
    if len(labels) < 2 * _MAX_SEARCHED or len(l2_path) == 1:
        folds = _Folds.of(
            features, labels, assign(labels), num_classes, task, num_views, class_weights
        )
        best = _search_from_the_strongest(folds, l2_path, tolerance)
    else:
        part = np.sort(task.draw_order(labels, seed)[:_MAX_SEARCHED])
        rows = np.concatenate([part + view * len(labels) for view in range(num_views)])
        of_part = _Folds.of(
            features[rows],
            labels[part],
            assign(labels[part]),
            num_classes,
            task,
            num_views,
            class_weights,
        )
        found = _search_from_the_strongest(of_part, l2_path, ROUGH_TOLERANCE)
        # The penalty is on the mean loss: that of twice as many images is half as strong.
        place = l2_path.index(found.l2) + round(2 * np.log10(len(labels) / len(part)))
        folds = _Folds.of(
            features, labels, assign(labels), num_classes, task, num_views, class_weights
        )
        start = folds.start_from(*of_part.solve_on_all(found, ROUGH_TOLERANCE))
        best = _search_around(folds, l2_path, min(place, len(l2_path) - 1), start, tolerance)
    weight, bias = folds.solve_on_all(best, tolerance)
    return Probe(
        np.ascontiguousarray(weight.T),
        bias,
        best.l2,
        best.held_out,
        task.fit_temperature(best.held_out, labels),
        num_views,
        class_weights,
    )


@dataclass(frozen=True)
class _Found:
    """Solutions `[K,F+1,C]` of all folds at one strength, and what they say of held-out images."""

    l2: float
    solution: Floats
    held_out: Floats
    loss: float


@dataclass(frozen=True)
class _Folds:
    """K problems, each with a fold held out. `features` are coordinates in `span`, if any."""

    features: Features
    scaling: Scaling
    span: Span | None
    labels: Labels
    folds: npt.NDArray[np.int64]
    num_classes: int
    task: Task
    num_views: int
    class_weights: Floats | None

    @classmethod
    def of(
        cls,
        features: Features,
        labels: Labels,
        folds: npt.NDArray[np.int64],
        num_classes: int,
        task: Task,
        num_views: int,
        class_weights: Floats | None,
    ) -> _Folds:
        scaling, span = Scaling.of(features), None
        if features.shape[1] >= _WORTH_A_SPAN * len(features):
            span = Span.of(features, scaling)
            features, scaling = span.coordinates, Scaling.none(len(features))
        return cls(
            features, scaling, span, labels, folds, num_classes, task, num_views, class_weights
        )

    @functools.cached_property
    def zero(self) -> Floats:
        num_folds = int(self.folds.max()) + 1
        return np.zeros((num_folds, self.features.shape[1] + 1, self.num_classes), np.float32)

    def start_from(self, weight: Floats, bias: Floats) -> Floats:
        """Solutions `[K,F+1,C]`, each this head `[F,C]` for raw features; in a span, zeros."""
        return (
            self.zero
            if self.span is not None
            else self.zero + self.scaling.take_out(weight.T, bias)
        )

    def solve(self, l2: float, start: Floats, tolerance: float) -> _Found:
        is_in_training = np.stack([self.folds != fold for fold in range(len(self.zero))])
        counts = np.tile(is_in_training.astype(np.float32), self.num_views) * self._weights
        solution = minimise(self._objective(counts, l2), start, tolerance)
        plain = self.features[: len(self.labels)]
        held_out = _held_out_logits(plain, self.scaling, solution, self.folds)
        loss = self.task.log_loss(held_out, self.labels, self.class_weights)
        return _Found(l2, solution, held_out, loss)

    def solve_on_all(self, found: _Found, tolerance: float) -> tuple[Floats, Floats]:
        """Weights `[F,C]` and a bias `[C]` for raw features, with no image held out."""
        start = found.solution.mean(axis=0, keepdims=True)
        objective = self._objective(self._weights[None], found.l2)
        solution = minimise(objective, start, tolerance)[0]
        return (self.scaling if self.span is None else self.span).fold_in(solution)

    @functools.cached_property
    def _all_labels(self) -> Labels:
        return np.concatenate([self.labels] * self.num_views)

    @functools.cached_property
    def _weights(self) -> Floats:
        return _image_weights(self._all_labels, self.class_weights)

    def _objective(self, counts: Floats, l2: float) -> Objective:
        return Objective(
            self.features,
            self._all_labels,
            counts,
            l2,
            self.scaling,
            self.num_classes,
            self.task,
        )


def _search_from_the_strongest(
    folds: _Folds, l2_path: tuple[float, ...], tolerance: float
) -> _Found:
    """The best strength, until two in a row are worse than the best before them."""
    best = found = folds.solve(l2_path[0], folds.zero, tolerance)
    num_worse = 0
    for l2 in l2_path[1:]:
        found = folds.solve(l2, found.solution, tolerance)
        if found.loss < best.loss:
            best, num_worse = found, 0
        else:
            num_worse += 1
            if num_worse == 2:
                break
    return best


def _search_around(
    folds: _Folds, l2_path: tuple[float, ...], place: int, start: Floats, tolerance: float
) -> _Found:
    """The best strength on the way from a place to weaker ones, or else to stronger ones."""
    best = first = folds.solve(l2_path[place], start, tolerance)
    for way in (l2_path[place + 1 :], l2_path[:place][::-1]):
        for l2 in way:
            found = folds.solve(l2, best.solution, tolerance)
            if found.loss >= best.loss:
                break
            best = found
        if best is not first:
            break
    return best


def solve_on_best_views(
    features: Features,
    labels: Labels,
    num_classes: int,
    *,
    task: Task = SINGLE_LABEL,
    seed: int,
    class_weights: Floats | None = None,
    l2_path: tuple[float, ...] = L2_PATH,
) -> Probe:
    """`solve_probe` on all views in `features` `[V·N,F]`, or on the plain ones if that is as good.

    Cross-validated log loss decides.
    """
    num_views = len(features) // max(1, len(labels))
    plain = solve_probe(
        features[: len(labels)],
        labels,
        num_classes,
        task=task,
        seed=seed,
        class_weights=class_weights,
        l2_path=l2_path,
    )
    if num_views == 1:
        return plain
    augmented = solve_probe(
        features,
        labels,
        num_classes,
        task=task,
        seed=seed,
        num_views=num_views,
        class_weights=class_weights,
        l2_path=l2_path,
    )
    losses = [
        task.log_loss(probe.out_of_fold_logits, labels, class_weights)
        for probe in (plain, augmented)
    ]
    helps = losses[1] < losses[0]
    outcome = "they help" if helps else "they do not help, so only the plain crop is used"
    logger.info(
        "%d views: out-of-fold log loss %.4f, without %.4f: %s",
        num_views,
        losses[1],
        losses[0],
        outcome,
    )
    return augmented if helps else plain


def solve_head(
    features: Features,
    labels: Labels,
    num_classes: int,
    l2: float,
    start: tuple[Floats, Floats] | None = None,
    class_weights: Floats | None = None,
    task: Task = SINGLE_LABEL,
) -> tuple[Floats, Floats]:
    """Weight `[C,F]` and bias `[C]` for `features` `[N,F]` at one strength of L2.

    `start`, the head of similar features, saves steps. `class_weights` `[C]` weigh the loss.
    """
    scaling = Scaling.of(features)
    solution = np.zeros((1, features.shape[1] + 1, num_classes), np.float32)
    if start is not None:
        solution[0] = scaling.take_out(*start)
    weights = _image_weights(labels, class_weights)[None]
    objective = Objective(features, labels, weights, l2, scaling, num_classes, task)
    solved, bias = scaling.fold_in(minimise(objective, solution)[0])
    return np.ascontiguousarray(solved.T), bias


def soften(
    probe: Probe,
    features: Features,
    labels: Labels,
    num_classes: int,
    task: Task = SINGLE_LABEL,
) -> Probe:
    """The probe with a head to start gradient epochs from, solved at the strongest L2 of the path.

    The best head on frozen features has weights so large that the first steps spoil the layers
    below it, and fits so well that little is left to learn. From the soft head 5 epochs led to
    0.989 and 1.000 on the digits and 0.861 on the emoji, from the probe's to 0.986 and 0.840.
    """
    weight, bias = solve_head(
        features,
        labels,
        num_classes,
        max(L2_PATH),
        class_weights=probe.class_weights,
        task=task,
    )
    return replace(probe, weight=weight, bias=bias)


def _image_weights(labels: Labels, class_weights: Floats | None) -> Floats:
    return np.ones(len(labels), np.float32) if class_weights is None else class_weights[labels]


@dataclass(frozen=True)
class Scaling:
    """Standardises features inside the products, so that they are not copied.

    (X - mean) / scale · W = X · (W / scale) - mean · (W / scale)
    """

    mean: Floats
    scale: Floats

    @classmethod
    def of(cls, features: Features) -> Scaling:
        mean = features.mean(axis=0, dtype=np.float64)
        square = np.einsum("nf,nf->f", features, features, dtype=np.float64) / len(features)
        scale = np.sqrt(np.maximum(square - mean**2, 0))
        # A feature that hardly varies would be scaled up to noise, so the scale has a floor. One
        # that varies only by float32's rounding is ignored.
        floored = np.maximum(scale, float(scale.mean()) * 1e-2)
        return cls(
            mean.astype(np.float32),
            np.where(scale <= 1e-5 * np.abs(mean), np.inf, floored).astype(np.float32),
        )

    @classmethod
    def none(cls, num_features: int) -> Scaling:
        """Leaves features as they are."""
        return cls(np.zeros(num_features, np.float32), np.ones(num_features, np.float32))

    def fold_in(self, solution: Floats) -> tuple[Floats, Floats]:
        """Weights `[…,F,C]` and biases `[…,C]` for raw features from a solution `[…,F+1,C]`."""
        weight = solution[..., :-1, :] / self.scale[:, None]
        return weight, solution[..., -1, :] - np.einsum("f,...fc->...c", self.mean, weight)

    def take_out(self, weight: Floats, bias: Floats) -> Floats:
        """The solution `[F+1,C]` of a head with weight `[C,F]` and bias `[C]`: of fold_in's."""
        scaled = weight.T * np.where(np.isinf(self.scale), 0, self.scale)[:, None]
        return np.concatenate([scaled, (bias + weight @ self.mean)[None]])


@dataclass(frozen=True)
class Span:
    """N images in the span of their standardised features S `[N,F]`, where F is more than N.

    The best head with L2 is a sum of images' features (Kimeldorf & Wahba, Some results on
    Tchebycheffian spline functions, 1971), so it suffices to look there: with the Cholesky factor
    S Sᵀ = L Lᵀ, `coordinates` L `[N,N]` have the products and norms that the features have.
    """

    coordinates: Floats
    standardised: Floats
    scaling: Scaling

    @classmethod
    def of(cls, features: Features, scaling: Scaling) -> Span:
        standardised = (features - scaling.mean) / scaling.scale
        products = (standardised @ standardised.T).astype(np.float64)
        # Images that are sums of others, as one is of all once they are centred, have no
        # coordinate of their own: a small one is given to each.
        products[np.diag_indices_from(products)] += (
            _OWN_COORDINATE * np.trace(products) / len(products) + _TINY
        )
        return cls(np.linalg.cholesky(products).astype(np.float32), standardised, scaling)

    def fold_in(self, solution: Floats) -> tuple[Floats, Floats]:
        """Weights `[F,C]` and a bias `[C]` for raw features from a solution `[N+1,C]`."""
        shares = np.linalg.solve(self.coordinates.T.astype(np.float64), solution[:-1])
        weights = self.standardised.T @ shares.astype(np.float32)
        return self.scaling.fold_in(np.concatenate([weights, solution[-1:]]))


def _held_out_logits(
    features: Features, scaling: Scaling, solution: Floats, folds: npt.NDArray[np.int64]
) -> Floats:
    weights, biases = scaling.fold_in(solution)
    logits = np.empty((len(features), solution.shape[2]), np.float32)
    for fold in range(len(solution)):
        logits[folds == fold] = features[folds == fold] @ weights[fold] + biases[fold]
    return logits


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


def minimise(objective: Objective, start: Floats, tolerance: float = _TOLERANCE) -> Floats:
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


@dataclass(frozen=True)
class Head:
    """The head to publish: weight `[C,K]` and bias `[C]`, for the first K columns of features."""

    weight: Floats
    bias: Floats

    def logits(self, features: Features) -> Floats:
        """Features `[B,F]`, F at least K → logits `[B,C]`, before temperature."""
        columns = features[:, : self.weight.shape[1]]
        return np.asarray(columns @ self.weight.T + self.bias, np.float32)
