"""Encoded image bytes → the `uint8 [H,W,3]` crop that a backbone sees.

The same code in training, evaluation and serving, and without torch, because the service runs
without it. `models/images.py` decodes; here is what is made of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
from PIL import Image

from models.images import UPRIGHT, ImageError, OpenedImage, Pixels, open_image

# Scaled decoding, and Pillow's reducing gap, stay this factor above the target size, so that the
# antialiased resize does the rest.
REDUCING_GAP = 2.0

# How a picture becomes a square. crop: as the network was pretrained, mostly the middle 87.5 % of
# the shorter side. whole: all of the shorter side. squash: both sides, each to its own scale. pad:
# the whole picture, with the pretraining's mean colour beside it.
Fit = Literal["crop", "whole", "squash", "pad"]
FITS: tuple[Fit, ...] = get_args(Fit)
CropMode = Literal["center", "squash", "border"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


# No network takes larger crops; one of this size is 805 MB.
_MAX_SIZE = 16_384


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

    `mean` and `std` are fractions of 255, per channel, applied inside the engine. `crop_mode` has
    timm's names: "center" keeps the aspect ratio and crops, "border" keeps it and pads with `mean`,
    "squash" does not keep it. `stretch` spreads the values that an image of 16 bits a channel uses
    over the whole range.
    """

    height: int = 224
    width: int = 224
    crop_fraction: float = 0.875
    crop_mode: CropMode = "center"
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

    def fitted(self, fit: Fit) -> Self:
        """The same with another way of making a picture a square; `self` is the pretraining's."""
        if fit == "crop":
            return self
        modes: dict[Fit, CropMode] = {"whole": "center", "squash": "squash", "pad": "border"}
        return replace(self, crop_mode=modes[fit], crop_fraction=1.0)

    def open(self, data: bytes, *, max_pixels: int | None = None) -> OpenedImage:
        """The image in `data`, decoded no larger than its crop needs. Raises ImageError."""
        return open_image(
            data, max_pixels=max_pixels, min_scale=self._min_scale, stretch=self.stretch
        )

    def share_cut_off(self, width: int, height: int) -> float:
        """The part that the crop leaves out of a side of an image of this size, at most."""
        crop_width, crop_height = self._crop_size(width, height, 1)
        return max(0.0, 1 - crop_width / width, 1 - crop_height / height)

    def crop(self, opened: OpenedImage, view: View | None = None) -> Pixels:
        """The upright crop of an opened image, `uint8 [H,W,3]`."""
        orientation = opened.orientation
        width, height = opened.width * opened.scale, opened.height * opened.scale
        crop_width, crop_height = self._crop_size(width, height, orientation)
        center_x, center_y = width / 2, height / 2
        if view is not None:
            center_x += view.center_x * crop_width
            center_y += view.center_y * crop_height
            crop_width, crop_height = crop_width * view.scale, crop_height * view.scale
            if self.crop_mode != "border":
                crop_width, crop_height = min(crop_width, width), min(crop_height, height)
                center_x = min(max(center_x, crop_width / 2), width - crop_width / 2)
                center_y = min(max(center_y, crop_height / 2), height - crop_height / 2)
        left, top = center_x - crop_width / 2, center_y - crop_height / 2
        inside = (
            max(left, 0.0),
            max(top, 0.0),
            min(left + crop_width, width),
            min(top + crop_height, height),
        )
        size = target = self._target_size(orientation)
        margin = (0, 0)
        if self.crop_mode == "border":
            region = (left, top, left + crop_width, top + crop_height)
            size, margin = _place(inside, region, target)
        # Resized from the box: a resize before the crop would compute pixels for nothing.
        try:
            crop = opened.pixels.resize(
                size, _RESAMPLING[self.interpolation], box=inside, reducing_gap=REDUCING_GAP
            )
        except (ValueError, MemoryError) as error:
            raise ImageError(f"it cannot be resized: {error}") from error
        if size != target:
            canvas = Image.new("RGB", target, tuple(round(255 * share) for share in self.mean))
            canvas.paste(crop, margin)
            crop = canvas
        if orientation in UPRIGHT:
            crop = crop.transpose(UPRIGHT[orientation])
        if view is not None and view.mirror:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop)

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it. Omits `stretch` when false, so that fingerprints of checkpoints
        older than that field do not change."""
        fields = asdict(self)
        if not self.stretch:
            del fields["stretch"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """As `to_dict` gave it. Raises ValueError, TypeError or KeyError where it is not that."""
        read = cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
        read._check()
        return read

    def _check(self) -> None:
        """Raise ValueError with the first field that no crop can be made by."""
        is_allowed = {
            "height": _is_size(self.height),
            "width": _is_size(self.width),
            "crop_fraction": 0 < self.crop_fraction < math.inf,
            "crop_mode": self.crop_mode in get_args(CropMode),
            "interpolation": self.interpolation in _RESAMPLING,
            "mean": len(self.mean) == 3 and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == 3 and all(0 < value < math.inf for value in self.std),
            "stretch": isinstance(self.stretch, bool),
        }
        for name, is_good in is_allowed.items():
            if not is_good:
                raise ValueError(
                    f"preprocess: {name} is {getattr(self, name)!r}; height and width are whole "
                    f"numbers from 1 to {_MAX_SIZE}, crop_fraction and std above 0, mean and std "
                    f"of three numbers, crop_mode one of {', '.join(get_args(CropMode))}, "
                    f"interpolation one of {', '.join(_RESAMPLING)}, stretch true or false"
                )

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
        choose = max if self.crop_mode == "border" else min
        pixels_per_target = self.crop_fraction * choose(
            width / target_width, height / target_height
        )
        return target_width * pixels_per_target, target_height * pixels_per_target


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIZE


def _place(
    inside: tuple[float, float, float, float],
    region: tuple[float, float, float, float],
    target: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and left upper corner, on a canvas, of what of a region (left, top, right, bottom) is
    inside the image.

    Margins are rounded on each side alike, so that a picture and its mirror image are mirrored.
    """
    sizes, corners = [], []
    for axis in (0, 1):
        scale = target[axis] / (region[axis + 2] - region[axis])
        before = round(scale * (inside[axis] - region[axis]))
        after = round(scale * (region[axis + 2] - inside[axis + 2]))
        sizes.append(max(1, target[axis] - before - after))
        corners.append(min(before, target[axis] - 1))
    return (sizes[0], sizes[1]), (corners[0], corners[1])
