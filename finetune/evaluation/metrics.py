"""What the metrics of all tasks have in common: averages with intervals, a table of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from finetune.evaluation.interval import Interval

Shares = npt.NDArray[np.float64]


class Metrics(Protocol):
    """How good a head is on one split; `loss` is in nats, of the logits as they are."""

    # The averages that have intervals: attribute → name for people. The first is `score`.
    NAMES: ClassVar[dict[str, str]]

    @property
    def loss(self) -> float: ...

    @property
    def num_images(self) -> int: ...

    @property
    def score(self) -> float:
        """What runs and epochs are compared by."""

    @property
    def macro_f1(self) -> float: ...

    @property
    def support(self) -> npt.NDArray[np.int64]:
        """Images of each class, `[C]`; so are the next three."""

    @property
    def precision(self) -> Shares: ...

    @property
    def recall(self) -> Shares: ...

    @property
    def f1(self) -> Shares: ...

    @property
    def per_class(self) -> Mapping[str, npt.NDArray[Any]]:
        """The columns of a table of classes, `[C]` each."""

    @property
    def intervals(self) -> Mapping[str, Interval]:
        """95 % intervals of all that NAMES has over the images; the same at every call."""

    @property
    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Images by true (row) and predicted (column) label, `[C,C]`; None for tasks without."""

    @property
    def summary(self) -> str:
        """The further averages of a run's last words."""

    def goal(self, *, is_balanced: bool) -> float:
        """What the best epoch has most of; `is_balanced` if classes are to count the same."""

    def with_interval(self, name: str) -> str:
        """`0.9833 (0.969 to 0.994)` for one of the names of `intervals`."""

    def to_dict(self, label_names: tuple[str, ...]) -> dict[str, Any]:
        """As metrics.json holds it."""


def most_confused(confusion: npt.NDArray[np.int64], max_pairs: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: true label, predicted label, images."""
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:max_pairs]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [
        (int(true), int(predicted), int(mistakes[true, predicted]))
        for true, predicted in pairs
        if mistakes[true, predicted]
    ]


def tabulate(
    metrics: Metrics, label_names: Sequence[str], label_word: str = "class"
) -> list[tuple[str, ...]]:
    """The head of a table of classes, then a row for each, as people read them."""
    columns = metrics.per_class
    rows = zip(label_names, *columns.values(), strict=True)
    return [
        (label_word, *columns),
        *(
            (
                name,
                *(f"{number:.3f}" if number.dtype.kind == "f" else f"{number:,}" for number in row),
            )
            for name, *row in rows
        ),
    ]


def format_with_interval(value: float, interval: Interval) -> str:
    """`0.9833 (0.969 to 0.994)`."""
    return f"{value:.4f} ({interval.low:.3f} to {interval.high:.3f})"
