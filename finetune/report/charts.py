"""Charts of the report as inline SVG: their colours are the page's, so that they follow its light or dark."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.evaluation.calibration import NUM_BINS, Reliability
from finetune.probe.learning_curve import LearningCurve
from finetune.tasks.task import Words

_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 12, 14, 40
_Ticks = Iterable[tuple[float, str]]


def chart_reliability(before: Reliability, after: Reliability, words: Words) -> str:
    """Accuracy against score, by bin: bars after temperature, rings before.

    On the diagonal, scores are what they say.
    """
    counted, right = words.decisions, words.right
    width, height = 340, 320
    across, up = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    ticks = [(value / 4, f"{value / 4:g}") for value in range(5)]
    parts = []
    for index in range(NUM_BINS):
        if after.counts[index]:
            x, tall = _LEFT + across * index / NUM_BINS, up * after.accuracies[index]
            said = f"{after.counts[index]:,} {counted} of score {after.scores[index]:.2f}: {after.accuracies[index]:.0%} {right}"
            box = f'x="{x + 1:.1f}" y="{_TOP + up - tall:.1f}" width="{across / NUM_BINS - 2:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar" {box}><title>{said}</title></rect>')
    parts.append(
        f'<line class="dashed" x1="{_LEFT}" y1="{_TOP + up}" x2="{_LEFT + across}" y2="{_TOP}"/>'
    )
    for index in range(NUM_BINS):
        if before.counts[index]:
            x, y = _LEFT + across * before.scores[index], _TOP + up * (1 - before.accuracies[index])
            said = f"before temperature: {before.counts[index]:,} {counted} of score {before.scores[index]:.2f}"
            parts.append(
                f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{said}</title></circle>'
            )
    return _frame(width, height, ticks, ticks, "score", words.fraction_right, parts)


def chart_learning_curve(curve: LearningCurve) -> str:
    """Accuracy against training images, and where twice as many are expected to lead."""
    width, height = 420, 300
    across, up = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    sizes, last = curve.num_images, curve.accuracies[-1]
    expected = [
        min(last + value, 1) for value in (curve.interval.low, curve.gain, curve.interval.high)
    ]
    low, high = min(*curve.accuracies, *expected), max(*curve.accuracies, *expected)
    margin = max(0.15 * (high - low), 0.002)
    low, high = low - margin, high + margin

    def at(size: float, accuracy: float) -> tuple[float, float]:
        return _LEFT + across * (size / (2 * sizes[-1])), _TOP + up * (high - accuracy) / (
            high - low
        )

    points = [at(size, accuracy) for size, accuracy in zip(sizes, curve.accuracies, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    (x, y_low), (_, y), (_, y_high) = (at(2 * sizes[-1], accuracy) for accuracy in expected)
    parts = [
        f'<line class="dashed" x1="{points[-1][0]:.1f}" y1="{points[-1][1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>',
        f'<line class="whisker" x1="{x:.1f}" y1="{y_low:.1f}" x2="{x:.1f}" y2="{y_high:.1f}"/>',
        f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>twice the images: about {expected[1]:.4f}</title></circle>',
        f'<polyline class="line" points="{line}"/>',
    ]
    for (x, y), size, accuracy in zip(points, sizes, curve.accuracies, strict=True):
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{size:,} images: {accuracy:.4f}</title></circle>'
        )
    columns = [
        (size / (2 * sizes[-1]), f"{size:,}") for size in (*sizes[:2], sizes[-1], 2 * sizes[-1])
    ]
    rows = [(share, f"{low + share * (high - low):.3f}") for share in (0.1, 0.5, 0.9)]
    return _frame(
        width,
        height,
        columns,
        rows,
        "training images",
        f"validation {curve.metric.replace('_', ' ')}",
        parts,
    )


def _frame(
    width: int,
    height: int,
    columns: _Ticks,
    rows: _Ticks,
    x_name: str,
    y_name: str,
    parts: list[str],
) -> str:
    """Ticks are shares of the axis with their words."""
    right, floor = width - _RIGHT, height - _BOTTOM
    drawn = []
    for share, words in columns:
        x = _LEFT + share * (right - _LEFT)
        anchor = "end" if share == 1 else "middle"
        drawn.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{floor}"/>')
        drawn.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="{anchor}">{words}</text>')
    for share, words in rows:
        y = floor - share * (floor - _TOP)
        drawn.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    drawn.append(
        f'<text class="name" x="{(_LEFT + right) / 2}" y="{height - 6}" text-anchor="middle">{x_name}</text>'
    )
    turned = f'transform="translate(11 {(_TOP + floor) / 2}) rotate(-90)"'
    drawn.append(f'<text class="name" {turned} text-anchor="middle">{y_name}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" style="max-width:{width}px">{"".join(drawn + parts)}</svg>'
