"""Features for the solver: standardised inside its products, or as coordinates in a span."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.engine.engine import Features
from models.scores import Floats

# A part of an image's own square norm, and what keeps images without any apart.
_OWN_COORDINATE, _TINY = 1e-5, 1e-12


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

    def unfold(self, weight: Floats, bias: Floats) -> Floats:
        """The solution `[F+1,C]` of which `fold_in` makes this weight `[F,C]` and bias `[C]`."""
        scaled = weight * np.where(np.isinf(self.scale), 0, self.scale)[:, None]
        return np.concatenate([scaled, (bias + self.mean @ weight)[None]])


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
