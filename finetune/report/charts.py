"""Charts of the report as inline SVG; the page's style gives the colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from markupsafe import Markup

from finetune.evaluation.calibration import NUM_BINS, Reliability
from finetune.evaluation.epoch import EpochMetrics
from finetune.probe.learning_curve import LearningCurve
from finetune.report.ticks import nice_ticks
from finetune.tasks.task import Words

_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 26, 14, 40
_FRACTIONS = tuple((value / 4, f"{value / 4:g}") for value in range(5))


def chart_reliability(before: Reliability, after: Reliability, words: Words) -> Markup:
    """Fraction right against score, by bin: bars after temperature, rings before."""
    chart = _Chart(360, 330, (0, 1), (0, 1))
    chart.draw_frame(_FRACTIONS, _FRACTIONS, "score", words.fraction_right)
    for index in range(NUM_BINS):
        if after.counts[index]:
            chart.draw_bar(
                index / NUM_BINS,
                (index + 1) / NUM_BINS,
                after.accuracies[index],
                f"{after.counts[index]:,} {words.decisions} of score {after.scores[index]:.2f}: "
                f"{after.accuracies[index]:.0%} {words.right}",
            )
    chart.draw_line("dashed", [(0, 0), (1, 1)])
    for index in range(NUM_BINS):
        if before.counts[index]:
            chart.draw_point(
                "ring",
                (before.scores[index], before.accuracies[index]),
                f"before temperature: {before.counts[index]:,} {words.decisions} "
                f"of score {before.scores[index]:.2f}",
            )
    chart.draw_legend([("bar", "after temperature"), ("ring", "before")])
    return chart.to_markup()


def chart_learning_curve(curve: LearningCurve) -> Markup:
    """Score against training images, and what twice as many are expected to give."""
    sizes, last = curve.num_images, curve.accuracies[-1]
    twice = 2 * sizes[-1]
    low, middle, high = (
        min(last + gain, 1) for gain in (curve.interval.low, curve.gain, curve.interval.high)
    )
    y_range = _padded([*curve.accuracies, low, high], margin=0.15, least=0.002)
    chart = _Chart(440, 320, (0, twice), y_range)
    chart.draw_frame(
        [(size, f"{size:,}") for size in (*sizes[:2], sizes[-1], twice)],
        nice_ticks(*y_range),
        "training images",
        f"validation {curve.metric.replace('_', ' ')}",
    )
    chart.draw_line("dashed", [(sizes[-1], last), (twice, middle)])
    chart.draw_line("whisker", [(twice, low), (twice, high)])
    chart.draw_point("ring", (twice, middle), f"twice the images: about {middle:.4f}")
    measured = list(zip(sizes, curve.accuracies, strict=True))
    chart.draw_line("line", measured)
    for size, accuracy in measured:
        chart.draw_point("dot", (size, accuracy), f"{size:,} images: {accuracy:.4f}")
    chart.draw_legend([("line", "measured"), ("ring", "expected")])
    return chart.to_markup()


def chart_losses(epochs: Sequence[EpochMetrics], best_epoch: int) -> Markup:
    """Training and validation loss by epoch; epoch 0 is the head that training began from."""
    val = [(epoch.epoch, epoch.val_loss) for epoch in epochs]
    train = [(epoch.epoch, epoch.train_loss) for epoch in epochs if epoch.train_loss is not None]
    finite = [loss for _, loss in (*val, *train) if math.isfinite(loss)]
    chart = _epochs_chart(epochs, _padded(finite or [0.0, 1.0]), "loss, nats")
    chart.draw_curve("other", train, "train loss")
    chart.draw_curve("line", val, "val loss", best_epoch)
    chart.draw_legend([("line", "val"), ("other", "train")])
    return chart.to_markup()


def chart_scores(
    epochs: Sequence[EpochMetrics], best_epoch: int, probe_score: float, metric_name: str
) -> Markup:
    """Validation score by epoch, beside that of the probe."""
    scores = [(epoch.epoch, epoch.val_score) for epoch in epochs]
    finite = [score for _, score in scores if math.isfinite(score)]
    chart = _epochs_chart(
        epochs, _padded([*finite, probe_score], least=0.002), f"val {metric_name}"
    )
    chart.draw_line("dashed", [(0, probe_score), (max(epochs[-1].epoch, 1), probe_score)])
    chart.draw_curve("line", scores, f"val {metric_name}", best_epoch)
    chart.draw_legend([("line", "fine-tuned"), ("dashed", "probe")])
    return chart.to_markup()


def _epochs_chart(
    epochs: Sequence[EpochMetrics], y_range: tuple[float, float], y_name: str
) -> _Chart:
    last = max(epochs[-1].epoch, 1)
    chart = _Chart(440, 280, (0, last), y_range)
    step = max(1, math.ceil(last / 8))
    columns = [(number, str(number)) for number in range(0, last + 1, step)]
    chart.draw_frame(columns, nice_ticks(*y_range), "epoch", y_name)
    return chart


_Point = tuple[float, float]


class _Chart:
    """An SVG whose points are given in the units of its axes."""

    def __init__(
        self, width: int, height: int, x_range: tuple[float, float], y_range: tuple[float, float]
    ) -> None:
        self._width, self._height = width, height
        self._x_range, self._y_range = x_range, y_range
        self._root = ElementTree.Element(
            "svg",
            {
                "viewBox": f"0 0 {width} {height}",
                "role": "img",
                "style": f"max-width:{width}px",
            },
        )

    def draw_frame(
        self,
        columns: Iterable[tuple[float, str]],
        rows: Iterable[tuple[float, str]],
        x_name: str,
        y_name: str,
    ) -> None:
        """Ticks are places on an axis with their words."""
        right, floor = self._width - _RIGHT, self._height - _BOTTOM
        for place, words in columns:
            x = self._x(place)
            self._add("line", "grid", x1=x, y1=_TOP, x2=x, y2=floor)
            anchor = "end" if place == self._x_range[1] else "middle"
            self._add_text(words, x, floor + 16, anchor)
        for place, words in rows:
            y = self._y(place)
            self._add("line", "grid", x1=_LEFT, y1=y, x2=right, y2=y)
            self._add_text(words, _LEFT - 6, y + 4, "end")
        self._add_text(x_name, (_LEFT + right) / 2, self._height - 6, "middle")
        turned = f"translate(11 {(_TOP + floor) / 2}) rotate(-90)"
        text = ElementTree.SubElement(
            self._root, "text", {"transform": turned, "text-anchor": "middle"}
        )
        text.text = y_name

    def draw_legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Kinds of marks and what they stand for, in a row above the frame."""
        x = float(_LEFT)
        for kind, words in entries:
            if kind == "bar":
                self._add("rect", kind, x=x + 4, y=4, width=12, height=12)
            elif kind == "ring":
                self._add("circle", kind, cx=x + 10, cy=10, r=4)
            else:
                self._add("line", kind, x1=x, y1=10, x2=x + 20, y2=10)
            self._add_text(words, x + 26, 14, "start")
            x += 26 + 6.5 * len(words) + 18

    def draw_bar(self, left: float, right: float, top: float, title: str) -> None:
        x, y = self._x(left) + 1, self._y(top)
        width, height = self._x(right) - 1 - x, self._y(self._y_range[0]) - y
        self._add("rect", "bar", title, x=x, y=y, width=width, height=height)

    def draw_point(self, kind: str, point: _Point, title: str) -> None:
        self._add("circle", kind, title, cx=self._x(point[0]), cy=self._y(point[1]), r=4)

    def draw_line(self, kind: str, points: Iterable[_Point]) -> None:
        joined = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        ElementTree.SubElement(self._root, "polyline", {"class": kind, "points": joined})

    def draw_curve(
        self, kind: str, points: Iterable[_Point], name: str, best_epoch: int | None = None
    ) -> None:
        """A value by epoch, without those that are NaN or infinite; the best epoch has a dot."""
        finite = [(epoch, value) for epoch, value in points if math.isfinite(value)]
        self.draw_line(kind, finite)
        for epoch, value in finite:
            title = f"epoch {epoch}: {name} {value:.4f}"
            if epoch == best_epoch:
                self.draw_point("dot", (epoch, value), f"{title}, the best epoch")
            else:
                self._add("circle", "hover", title, cx=self._x(epoch), cy=self._y(value), r=6)

    def to_markup(self) -> Markup:
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))

    def _x(self, value: float) -> float:
        low, high = self._x_range
        return _LEFT + (self._width - _RIGHT - _LEFT) * (value - low) / (high - low)

    def _y(self, value: float) -> float:
        low, high = self._y_range
        return _TOP + (self._height - _BOTTOM - _TOP) * (high - value) / (high - low)

    def _add(self, tag: str, kind: str, title: str = "", **places: float) -> None:
        rounded = {name: f"{place:.1f}" for name, place in places.items()}
        element = ElementTree.SubElement(self._root, tag, {"class": kind, **rounded})
        if title:
            ElementTree.SubElement(element, "title").text = title

    def _add_text(self, words: str, x: float, y: float, anchor: str) -> None:
        places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
        ElementTree.SubElement(self._root, "text", places).text = words


def _padded(
    values: Sequence[float], *, margin: float = 0.1, least: float = 0.0
) -> tuple[float, float]:
    """The range of some values, with a margin of that fraction of it on both sides."""
    low, high = min(values), max(values)
    room = max(margin * (high - low), least, 1e-6)
    return low - room, high + room
