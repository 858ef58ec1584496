"""Pictures of a run and of a comparison, for TensorBoard.

Those of every run are drawn with Pillow: importing matplotlib and laying out a figure take 1.3 s, a quarter of a run on cached features.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from finetune.evaluation.metrics import Metrics
from finetune.monitor import Picture
from models.preprocess import Pixels
from models.scores import Floats

_INK, _FAINT = "#1f2933", "#9aa5b1"
_PAD = 12
_TEXT, _SMALL_TEXT = 14, 11
# The shades of a cell: no image, half, and all of a true class's.
_SHADES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
# From what hardly counts to what counts most.
_HEAT = ((50, 70, 200), (40, 190, 200), (240, 215, 60), (205, 25, 25))
_LONGEST_NAME = 170
_TILE = 160
_DPI = 110


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: its crop, the true and the predicted label's name, the predicted one's score, and the sample's key.

    `label` is the number of the label that the answer is about; `looked_at` is the crop under a heat map of what spoke for the answer,
    where that was computed.
    """

    crop: Pixels
    true: str
    predicted: str
    score: float
    key: str = ""
    looked_at: Pixels | None = None
    label: int = 0


def draw_confusion(metrics: Metrics, label_names: tuple[str, ...]) -> Picture:
    """Rows are true labels, shaded by their share; counts stand in the cells where there is room for them."""
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
    shares = metrics.confusion / metrics.confusion.sum(axis=1, keepdims=True).clip(min=1)
    cells = Image.fromarray(_shade(shares, _SHADES).round().astype(np.uint8)).resize(
        (cell * num_classes,) * 2, Image.Resampling.NEAREST
    )
    image.paste(cells, (left, top))
    centre = [cell * label + cell // 2 for label in range(num_classes)]
    if num_classes <= 30:
        for true, predicted in zip(*np.nonzero(metrics.confusion), strict=True):
            color = "white" if shares[true, predicted] > 0.55 else _INK
            at = (left + centre[predicted], top + centre[true])
            draw.text(at, str(metrics.confusion[true, predicted]), color, _font(13), anchor="mm")
    for name, middle in zip(names, centre, strict=False):
        draw.text((left - 6, top + middle), name, _INK, font, anchor="rm")
        if are_upright:
            _draw_upwards(image, name, font, _INK, left + middle, top + side + 6)
        else:
            draw.text((left + middle, top + side + 6), name, _INK, font, anchor="ma")
    title = f"accuracy {metrics.accuracy:.1%} of {metrics.confusion.sum():,} images"
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
    """A crop `uint8 [H,W,3]` in grey, with `heat` `[H,W]` from 0 to 1 in colours over it; what is cold stays grey."""
    grey = crop.mean(axis=2, keepdims=True)
    opacity = 0.7 * heat[..., None]
    return np.asarray((1 - opacity) * grey + opacity * _shade(heat, _HEAT), np.uint8)


def _shade(values: Floats, shades: Sequence[tuple[int, int, int]]) -> Floats:
    """Values from 0 to 1, of any shape, as colours between `shades`, with a last axis for red, green and blue."""
    at = np.linspace(0, 1, len(shades))
    return np.stack(
        [np.interp(values, at, channel) for channel in zip(*shades, strict=True)], axis=-1
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # DejaVu Sans, by its file in a package that is there anyway, knows more alphabets than the font in Pillow.
    spec = importlib.util.find_spec("matplotlib")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, round(size * 0.9))
    return ImageFont.load_default(size)


def _shorten(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """`words` on one line, ended by … where they are wider than `width` pixels."""
    words = " ".join(words.split())
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f"{words}…") > width:
        words = words[:-1]
    return f"{words}…"


def _draw_upwards(
    image: Image.Image,
    words: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    color: str,
    middle: int,
    top: int,
) -> None:
    """Text that reads from below, its end at `top`, about the column `middle`."""
    lying = Image.new("RGB", (round(font.getlength(words)) + 1, _TEXT + 5), "white")
    ImageDraw.Draw(lying).text((0, lying.height / 2), words, color, font, anchor="lm")
    image.paste(lying.rotate(90, expand=True), (middle - lying.height // 2, top))


def _to_picture(image: Image.Image) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Picture(buffer.getvalue(), image.height, image.width)


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
    # Imported here: see above.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for candidate in candidates:
        is_chosen = candidate is recommended
        color = "#0b69a3" if is_chosen else _FAINT
        below, above = candidate.accuracy - candidate.low, candidate.high - candidate.accuracy
        face = color if is_chosen else "white"
        point = (candidate.images_per_second, candidate.accuracy)
        axes.errorbar(
            *point, yerr=[[below], [above]], fmt="o", color=color, markerfacecolor=face, capsize=3
        )
        axes.annotate(
            candidate.name, point, xytext=(8, 4), textcoords="offset points", fontsize=8, color=_INK
        )
    axes.set_xscale("log")
    axes.set_xlabel("images/s on this machine", color=_INK)
    axes.set_ylabel("cross-validated accuracy", color=_INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.25, y=0.15)
    figure.set_dpi(_DPI)
    buffer = io.BytesIO()
    # Said again: by itself savefig takes the resolution that the figure was made with, and then the size below is another.
    figure.savefig(buffer, format="png", dpi=_DPI)
    width, height = figure.canvas.get_width_height()
    return Picture(buffer.getvalue(), height, width)
