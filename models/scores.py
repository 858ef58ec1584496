"""Logits → probabilities, and whether an answer is unsure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis, `float32`."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True), np.float32)


def sigmoid(logits: Floats) -> Floats:
    """Each label's own probability, `float32`."""
    # tanh never overflows.
    return np.asarray(0.5 * np.tanh(0.5 * logits) + 0.5, np.float32)


def is_unsure(scores: Floats, threshold: float | npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether other than one label reaches `threshold`: scores `[…,C]` → `bool […]`.

    The labels that reach it are the conformal set: empty where none fits, or several.
    """
    return np.asarray((scores >= threshold).sum(axis=-1) != 1)
