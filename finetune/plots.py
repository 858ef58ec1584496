"""Pictures of a run, for TensorBoard and the model card."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.evaluate import Metrics
from models.preprocess import Pixels

_INK, _FAINT = "#1f2933", "#9aa5b1"
_DPI = 110


@dataclass(frozen=True)
class Picture:
    """An encoded PNG and its size in pixels."""

    png: bytes
    height: int
    width: int


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: its crop, the true and the predicted label's name, the predicted one's score, and the sample's key."""

    crop: Pixels
    true: str
    predicted: str
    score: float
    key: str = ""


def draw_confusion(metrics: Metrics, label_names: tuple[str, ...]) -> Picture:
    """Rows are true labels, shaded by their share; counts stand in the cells where there is room for them."""
    num_classes = len(label_names)
    side = min(max(4.0, 0.42 * num_classes + 2), 14)
    figure = Figure(figsize=(side, side * 0.94), layout="constrained")
    axes = figure.add_subplot()
    shares = metrics.confusion / metrics.confusion.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if num_classes <= 30:
        for true in range(num_classes):
            for predicted in range(num_classes):
                if count := int(metrics.confusion[true, predicted]):
                    color = "white" if shares[true, predicted] > 0.55 else _INK
                    axes.text(predicted, true, str(count), ha="center", va="center", color=color, fontsize=8)
    if num_classes <= 60:
        size = 9 if num_classes <= 30 else 6
        axes.set_xticks(range(num_classes), label_names, rotation=90 if num_classes > 10 or max(map(len, label_names)) > 3 else 0)
        axes.set_yticks(range(num_classes), label_names)
        axes.tick_params(labelsize=size, length=0, colors=_INK)
    axes.set_xlabel("predicted", color=_FAINT)
    axes.set_ylabel("true", color=_FAINT)
    axes.spines[:].set_visible(False)
    axes.set_title(f"accuracy {metrics.accuracy:.1%} of {metrics.confusion.sum():,} images", color=_INK, fontsize=10)
    return _to_picture(figure)


def draw_mistakes(mistakes: Sequence[Mistake]) -> Picture:
    """A grid of wrong answers, the most confident first."""
    columns = min(6, max(len(mistakes), 3))
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(1.75 * columns, 2.15 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        axes.imshow(mistake.crop)
        axes.set_title(f"{mistake.true}\n→ {mistake.predicted}  {mistake.score:.0%}", fontsize=8, color=_INK)
    for axes in grid.flat:
        axes.axis("off")
    if not mistakes:
        figure.text(0.5, 0.5, "no mistakes", ha="center", va="center", color=_FAINT)
    return _to_picture(figure)


def _to_picture(figure: Figure) -> Picture:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    buffer = io.BytesIO()
    # Said again: by itself savefig takes the resolution that the figure was made with, and then the size below is another.
    figure.savefig(buffer, format="png", dpi=_DPI)
    width, height = canvas.get_width_height()
    return Picture(buffer.getvalue(), height, width)


@dataclass(frozen=True)
class Candidate:
    """A backbone on a user's images: cross-validated accuracy with its 95 % interval, and speed here."""

    name: str
    accuracy: float
    low: float
    high: float
    images_per_second: float
    precision: str


def draw_comparison(candidates: Sequence[Candidate], recommended: Candidate) -> Picture:
    """Accuracy with its interval against images/s, the recommended one filled."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for candidate in candidates:
        is_chosen = candidate is recommended
        color = "#0b69a3" if is_chosen else _FAINT
        below, above = candidate.accuracy - candidate.low, candidate.high - candidate.accuracy
        face = color if is_chosen else "white"
        point = (candidate.images_per_second, candidate.accuracy)
        axes.errorbar(*point, yerr=[[below], [above]], fmt="o", color=color, markerfacecolor=face, capsize=3)
        axes.annotate(candidate.name, point, xytext=(8, 4), textcoords="offset points", fontsize=8, color=_INK)
    axes.set_xscale("log")
    axes.set_xlabel("images/s on this machine", color=_INK)
    axes.set_ylabel("cross-validated accuracy", color=_INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.25, y=0.15)
    return _to_picture(figure)
