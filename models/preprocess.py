"""Encoded image bytes → the `uint8 [H,W,3]` crop that a backbone sees.

The same code in training, evaluation and serving, and without torch, because the service runs
without it. `models/images.py` decodes; here is what is made of the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

from models.images import UPRIGHT, ImageError, OpenedImage, Pixels, open_image

# Scaled decoding, and Pillow's reducing gap, stay this factor above the target size, so that the
# antialiased resize does the rest.
REDUCING_GAP = 2.0

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class View:
    """A crop for augmentation, relative to the evaluation crop.

    `center_x` and `center_y` are offsets and `scale` a size, as fractions of that crop's side.
    """

    center_x: float = 0.0
    center_y: float = 0.0
    scale: float = 1.0
    mirror: bool = False


@dataclass(frozen=True)
class Preprocess:
    """All that happens between a file and the network's first layer; part of the fingerprint.

    `mean` and `std` are fractions of 255, per channel, applied inside the engine. `crop_mode`
    "center" keeps the aspect ratio and crops; "squash" does not. `stretch` spreads the values that
    an image of 16 bits a channel uses over the whole range.
    """

    height: int = 224
    width: int = 224
    crop_fraction: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    stretch: bool = False

    def __call__(
        self, data: bytes, *, view: View | None = None, max_pixels: int | None = None
    ) -> Pixels:
        """Decode `data` to the upright crop, `uint8 [H,W,3]`, deterministically.

        Raises ImageError as `open_image` does.
        """
        return self.crop(self.open(data, max_pixels=max_pixels), view)

    def open(self, data: bytes, *, max_pixels: int | None = None) -> OpenedImage:
        """The image in `data`, decoded no larger than its crop needs. Raises ImageError."""
        return open_image(
            data, max_pixels=max_pixels, min_scale=self._min_scale, stretch=self.stretch
        )

    def crop(self, opened: OpenedImage, view: View | None = None) -> Pixels:
        """The upright crop of an opened image, `uint8 [H,W,3]`."""
        orientation = opened.orientation
        width, height = opened.width * opened.scale, opened.height * opened.scale
        crop_width, crop_height = self._crop_size(width, height, orientation)
        center_x, center_y = width / 2, height / 2
        if view is not None:
            center_x += view.center_x * crop_width
            center_y += view.center_y * crop_height
            crop_width = min(crop_width * view.scale, width)
            crop_height = min(crop_height * view.scale, height)
            center_x = min(max(center_x, crop_width / 2), width - crop_width / 2)
            center_y = min(max(center_y, crop_height / 2), height - crop_height / 2)
        left, top = max(center_x - crop_width / 2, 0.0), max(center_y - crop_height / 2, 0.0)
        box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
        # Resized from the box: a resize before the crop would compute pixels for nothing.
        try:
            crop = opened.pixels.resize(
                self._target_size(orientation),
                _RESAMPLING[self.interpolation],
                box=box,
                reducing_gap=REDUCING_GAP,
            )
        except (ValueError, MemoryError) as error:
            raise ImageError(f"the image cannot be resized: {error}") from error
        if orientation in UPRIGHT:
            crop = crop.transpose(UPRIGHT[orientation])
        if view is not None and view.mirror:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop)

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it; without `stretch` where that is off, as before there was one,
        so that fingerprints stay."""
        fields = asdict(self)
        if not self.stretch:
            del fields["stretch"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    def _min_scale(self, width: int, height: int, orientation: int) -> float:
        crop_width, crop_height = self._crop_size(width, height, orientation)
        target_width, target_height = self._target_size(orientation)
        return REDUCING_GAP * max(target_width / crop_width, target_height / crop_height)

    def _target_size(self, orientation: int) -> tuple[int, int]:
        return (self.height, self.width) if orientation >= 5 else (self.width, self.height)

    def _crop_size(self, width: float, height: float, orientation: int) -> tuple[float, float]:
        """Width and height of the evaluation crop in raw pixels, before they are made upright."""
        if self.crop_mode == "squash":
            return width * self.crop_fraction, height * self.crop_fraction
        target_width, target_height = self._target_size(orientation)
        pixels_per_target = self.crop_fraction * min(width / target_width, height / target_height)
        return target_width * pixels_per_target, target_height * pixels_per_target
