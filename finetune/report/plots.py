"""Pictures as PNG, drawn with Pillow: what TensorBoard shows of a run, and the plot of backbones.

The report's charts are SVG (charts.py), which follows the page's light or dark colours and
which TensorBoard does not show. matplotlib would take 1.3 s to import and to lay out a figure, a
quarter of a run on cached features.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from finetune.monitor import Picture
from finetune.report.ticks import nice_ticks
from models.images import Pixels
from models.scores import Floats

_INK, _FAINT, _GRID, _ACCENT = "#1f2933", "#9aa5b1", "#e4e7eb", "#0b69a3"
_PAD = 12
_TEXT, _SMALL_TEXT = 14, 11
# Of a cell with none, half and all of a class's images.
_SHADES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
# From the least to the most.
_HEAT = ((50, 70, 200), (40, 190, 200), (240, 215, 60), (205, 25, 25))
_LONGEST_NAME = 170
_TILE = 160


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, with the names of the true and the predicted label and the latter's score.

    `key` is the sample's, `label` the place of the label that the answer is about. `heat_map` is
    the crop under colours that show what spoke for the answer, if that was computed.
    """

    crop: Pixels
    true: str
    predicted: str
    score: float
    key: str = ""
    heat_map: Pixels | None = None
    label: int = 0


def draw_confusion(confusion: npt.NDArray[np.int64], label_names: tuple[str, ...]) -> Picture:
    """`confusion` `[C,C]`: rows are true labels, shaded by their share; counts if they fit."""
    num_classes = len(label_names)
    cell = 38 if num_classes <= 30 else 18 if num_classes <= 60 else max(1, 1000 // num_classes)
    side, font = max(cell * num_classes, 260), _font(_TEXT if num_classes <= 30 else _SMALL_TEXT)
    cell = side // num_classes
    names = (
        [_shorten(name, font, _LONGEST_NAME) for name in label_names] if num_classes <= 60 else []
    )
    widest = max((round(font.getlength(name)) for name in names), default=0)
    are_upright = bool(names) and widest > cell - 6
    left, top = 3 * _PAD + _TEXT + widest, 3 * _PAD + _TEXT
    bottom = top + side + (0 if not names else widest if are_upright else _TEXT) + _PAD
    image = Image.new("RGB", (left + side + _PAD, bottom + _TEXT + 2 * _PAD), "white")
    draw = ImageDraw.Draw(image)
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    cells = Image.fromarray(_shade(shares, _SHADES).round().astype(np.uint8)).resize(
        (cell * num_classes,) * 2, Image.Resampling.NEAREST
    )
    image.paste(cells, (left, top))
    centre = [cell * label + cell // 2 for label in range(num_classes)]
    if num_classes <= 30:
        for true, predicted in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[true, predicted] > 0.55 else _INK
            at = (left + centre[predicted], top + centre[true])
            draw.text(at, str(confusion[true, predicted]), color, _font(13), anchor="mm")
    for name, middle in zip(names, centre, strict=False):
        draw.text((left - 6, top + middle), name, _INK, font, anchor="rm")
        if are_upright:
            _draw_upwards(image, name, font, _INK, left + middle, top + side + 6)
        else:
            draw.text((left + middle, top + side + 6), name, _INK, font, anchor="ma")
    title = f"accuracy {confusion.trace() / confusion.sum():.1%} of {confusion.sum():,} images"
    draw.text((left + side / 2, _PAD), title, _INK, _font(_TEXT), anchor="ma")
    draw.text((left + side / 2, bottom + _PAD), "predicted", _FAINT, _font(_TEXT), anchor="ma")
    _draw_upwards(image, "true", _font(_TEXT), _FAINT, _PAD + _TEXT // 2, top + side // 2 - 14)
    return _to_picture(image)


def draw_mistakes(mistakes: Sequence[Mistake]) -> Picture:
    """A grid of wrong answers, the most confident first."""
    columns = min(6, max(len(mistakes), 3))
    rows = max(1, -(-len(mistakes) // columns))
    width, height = _TILE + _PAD, _TILE + 2 * _TEXT + 2 * _PAD
    image = Image.new("RGB", (columns * width + _PAD, rows * height + _PAD), "white")
    draw = ImageDraw.Draw(image)
    font = _font(_TEXT)
    for index, mistake in enumerate(mistakes):
        x, y = _PAD + index % columns * width, _PAD + index // columns * height
        score = f"  {mistake.score:.0%}"
        predicted = _shorten(mistake.predicted, font, _TILE - font.getlength(f"→ {score}"))
        for line, words in enumerate(
            (_shorten(mistake.true, font, _TILE), f"→ {predicted}{score}")
        ):
            draw.text((x + _TILE / 2, y + line * (_TEXT + 3)), words, _INK, font, anchor="ma")
        crop = ImageOps.contain(Image.fromarray(mistake.crop), (_TILE, _TILE))
        image.paste(crop, (x + (_TILE - crop.width) // 2, y + 2 * _TEXT + _PAD))
    if not mistakes:
        draw.text((image.width / 2, image.height / 2), "no mistakes", _FAINT, font, anchor="mm")
    return _to_picture(image)


def draw_heat(crop: Pixels, heat: Floats) -> Pixels:
    """A crop `uint8 [H,W,3]` in grey under the colours of `heat` `[H,W]` from 0 to 1."""
    grey = crop.mean(axis=2, keepdims=True)
    opacity = 0.7 * heat[..., None]
    return np.asarray((1 - opacity) * grey + opacity * _shade(heat, _HEAT), np.uint8)


def _shade(values: Floats, shades: Sequence[tuple[int, int, int]]) -> Floats:
    """Values from 0 to 1 as colours between `shades`; adds a last axis of red, green and blue."""
    at = np.linspace(0, 1, len(shades))
    return np.stack(
        [np.interp(values, at, channel) for channel in zip(*shades, strict=True)], axis=-1
    )


@cache
def _font(size: int) -> _Font:
    # captum depends on matplotlib, which ships DejaVu Sans: it has Greek, Cyrillic, Arabic and
    # more; the font in Pillow has Latin letters only.
    spec = importlib.util.find_spec("matplotlib")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, round(size * 0.9))
    return ImageFont.load_default(size)


def _shorten(words: str, font: _Font, width: float) -> str:
    """`words` on one line, ended by … where they are wider than `width` pixels."""
    words = " ".join(words.split())
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f"{words}…") > width:
        words = words[:-1]
    return f"{words}…"


def _draw_upwards(
    image: Image.Image, words: str, font: _Font, color: str, middle: int, top: int
) -> None:
    """Text that reads from below, its end at `top`, about the column `middle`."""
    lying = _lying_text(words, font, color)
    image.paste(lying.rotate(90, expand=True), (middle - lying.height // 2, top))


def _lying_text(words: str, font: _Font, color: str) -> Image.Image:
    """Text on a white picture of its size, to be turned."""
    height = round(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else 20
    lying = Image.new("RGB", (round(font.getlength(words)) + 1, height), "white")
    ImageDraw.Draw(lying).text((0, height / 2), words, color, font, anchor="lm")
    return lying


def _to_picture(image: Image.Image) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Picture(buffer.getvalue(), image.height, image.width)


@dataclass(frozen=True)
class MeasuredBackbone:
    """Cross-validated accuracy with its 95 % interval on a user's images, and speed here."""

    name: str
    accuracy: float
    low: float
    high: float
    images_per_second: float
    precision: str


def draw_backbones(backbones: Sequence[MeasuredBackbone], recommended: MeasuredBackbone) -> Picture:
    """Accuracy with its interval against images/s (logarithmic); the recommended one is filled."""
    plot = _ScatterPlot(
        [backbone.images_per_second for backbone in backbones],
        [value for backbone in backbones for value in (backbone.low, backbone.high)],
    )
    plot.draw_axes("images/s on this machine", "cross-validated accuracy")
    for backbone in sorted(backbones, key=lambda backbone: backbone is recommended):
        plot.draw_backbone(backbone, is_recommended=backbone is recommended)
    for backbone in backbones:
        plot.write_name(backbone, is_recommended=backbone is recommended)
    return plot.to_picture()


class _ScatterPlot:
    """Drawn at twice its size, then halved: Pillow's lines and circles have no soft edges."""

    _WIDTH, _HEIGHT = 1500, 920
    _LEFT, _TOP, _RIGHT, _BOTTOM = 130, 30, 40, 110
    _TEXT = 26

    def __init__(self, speeds: Sequence[float], accuracies: Sequence[float]) -> None:
        self._image = Image.new("RGB", (2 * self._WIDTH, 2 * self._HEIGHT), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._font = _font(2 * self._TEXT)
        # Speeds by their logarithm; wide enough for the names beside the points.
        x_low, x_high = math.log10(min(speeds)), math.log10(max(speeds))
        room = max(0.25 * (x_high - x_low), 0.4)
        self._x_range = x_low - room, x_high + room
        y_low, y_high = min(accuracies), max(accuracies)
        room = max(0.1 * (y_high - y_low), 0.002)
        self._y_range = y_low - room, y_high + room

    def draw_axes(self, x_name: str, y_name: str) -> None:
        left, floor = self._LEFT, self._HEIGHT - self._BOTTOM
        for speed in _round_speeds(*self._x_range):
            x = self._x(speed)
            self._line((x, self._TOP), (x, floor), _GRID, 1)
            self._write(f"{speed:g}", (x, floor + 14), "ma", _INK)
        for accuracy, words in nice_ticks(*self._y_range, num_steps=7):
            y = self._y(accuracy)
            self._line((left, y), (self._WIDTH - self._RIGHT, y), _GRID, 1)
            self._write(words, (left - 14, y), "rm", _INK)
        self._line((left, self._TOP), (left, floor), _INK, 2)
        self._line((left, floor), (self._WIDTH - self._RIGHT, floor), _INK, 2)
        self._write(x_name, ((left + self._WIDTH) / 2, self._HEIGHT - 44), "ma", _INK)
        name = _lying_text(y_name, self._font, _INK).rotate(90, expand=True)
        self._image.paste(name, (20, self._TOP + floor - name.height // 2))

    def draw_backbone(self, backbone: MeasuredBackbone, *, is_recommended: bool) -> None:
        color = _ACCENT if is_recommended else _FAINT
        x, y = self._x(backbone.images_per_second), self._y(backbone.accuracy)
        low, high = self._y(backbone.low), self._y(backbone.high)
        self._line((x, low), (x, high), color, 3)
        for end in (low, high):
            self._line((x - 8, end), (x + 8, end), color, 3)
        box = tuple(2 * value for value in (x - 10, y - 10, x + 10, y + 10))
        self._draw.ellipse(box, color if is_recommended else "white", color, 6)

    def write_name(self, backbone: MeasuredBackbone, *, is_recommended: bool) -> None:
        """On the side of the point where there is more room."""
        words = f"{backbone.name}, recommended" if is_recommended else backbone.name
        x, y = self._x(backbone.images_per_second), self._y(backbone.accuracy) - 8
        left_room, right_room = x - self._LEFT - 18, self._WIDTH - x - 18
        if right_room > 0.8 * left_room:
            self._write(_shorten(words, self._font, 2 * right_room), (x + 18, y), "ls", _INK)
        else:
            self._write(_shorten(words, self._font, 2 * left_room), (x - 18, y), "rs", _INK)

    def to_picture(self) -> Picture:
        return _to_picture(self._image.reduce(2))

    def _x(self, speed: float) -> float:
        low, high = self._x_range
        width = self._WIDTH - self._RIGHT - self._LEFT
        return self._LEFT + width * (math.log10(speed) - low) / (high - low)

    def _y(self, accuracy: float) -> float:
        low, high = self._y_range
        height = self._HEIGHT - self._BOTTOM - self._TOP
        return self._TOP + height * (high - accuracy) / (high - low)

    def _line(
        self, start: tuple[float, float], end: tuple[float, float], color: str, width: int
    ) -> None:
        self._draw.line([(2 * x, 2 * y) for x, y in (start, end)], color, 2 * width)

    def _write(self, words: str, place: tuple[float, float], anchor: str, color: str) -> None:
        at = (2 * place[0], 2 * place[1])
        # White around the letters keeps them readable on a line.
        self._draw.text(
            at, words, color, self._font, anchor=anchor, stroke_width=8, stroke_fill="white"
        )


def _round_speeds(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, between two logarithms; only 1 where those are too many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    speeds = [factor * 10.0**power for power in powers for factor in factors]
    return [speed for speed in speeds if low <= math.log10(speed) <= high]
