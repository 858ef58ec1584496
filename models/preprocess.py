"""Encoded image bytes → the `uint8 [H,W,3]` crop that a backbone sees.

The same code in training, evaluation and serving, and without torch, because the service runs
without it. JPEG is decoded by simplejpeg (libjpeg-turbo, scaled decoding), the rest by Pillow.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from models.errors import GraftError

Pixels = npt.NDArray[np.uint8]

# Found by content, never by name. Pillow knows 40 more formats; their parsers are only a risk here.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# How their files begin: (bytes, offset).
_MAGIC = {
    (b"\xff\xd8\xff", 0): "JPEG",
    (b"\x89PNG", 0): "PNG",
    (b"WEBP", 8): "WEBP",
    (b"GIF8", 0): "GIF",
    (b"BM", 0): "BMP",
    (b"II*\x00", 0): "TIFF",
    (b"MM\x00*", 0): "TIFF",
}
# Checked in the header, before a pixel is decoded: Pillow's own limit, about 256 MiB of RGB.
MAX_PIXELS = 89_478_485
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
_EXIF_ORIENTATION_TAG = 0x0112
# What makes raw pixels upright, by EXIF orientation (CIPA DC-008, 4.6.5.1.6); 5 to 8 swap height
# and width.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Our own limit is checked right after the header is read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(GraftError):
    """The bytes cannot be decoded as an image; the message says why."""


class ImageTooLargeError(ImageError):
    """The header names more pixels than the limit."""


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
    "center" keeps the aspect ratio and crops; "squash" does not.
    """

    height: int = 224
    width: int = 224
    crop_fraction: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(
        self, data: bytes, *, view: View | None = None, max_pixels: int = MAX_PIXELS
    ) -> Pixels:
        """Decode `data` to the upright crop, `uint8 [H,W,3]`, deterministically.

        Raises ImageError where `data` is no image in one of FORMATS, or has over `max_pixels`.
        """
        if not data:
            raise ImageError("the file is empty")
        try:
            image, size, orientation = self._decode(data, max_pixels)
            return self._crop(image, size, orientation, view)
        except ImageError:
            raise
        # On hostile bytes Pillow's plugins raise nearly anything (struct.error, MemoryError …).
        except Exception as error:
            raise ImageError(f"the image cannot be decoded: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    def _decode(self, data: bytes, max_pixels: int) -> tuple[Image.Image, tuple[float, float], int]:
        """The raw image, its exact width and height in its pixels, and its EXIF orientation."""
        if data[:3] == b"\xff\xd8\xff":
            decoded = self._decode_jpeg(data, max_pixels)
            if decoded is not None:
                return decoded
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if (name := begins_as(data)) is not None:
                raise ImageError(
                    f"it begins as a {name} does, but is cut short or damaged ({len(data):,} bytes)"
                ) from None
            raise ImageError(
                f"not an image (it starts with {data[:12]!r}); readable are {', '.join(FORMATS)}"
            ) from None
        except Image.DecompressionBombError:
            # Pillow's own check comes before ours, at twice its limit.
            raise ImageError(
                f"the image is too large: it claims over {2 * MAX_PIXELS / 1e6:.0f} megapixels, "
                f"the limit is {max_pixels / 1e6:.1f}; make it smaller first"
            ) from None
        _check_pixels(image.width, image.height, max_pixels)
        image.load()
        # After load(): Pillow's TIFF reader turns the pixels itself and then drops the tag.
        orientation = image.getexif().get(_EXIF_ORIENTATION_TAG, 1)
        return _to_rgb(image), image.size, orientation if orientation in _UPRIGHT else 1

    def _decode_jpeg(
        self, data: bytes, max_pixels: int
    ) -> tuple[Image.Image, tuple[float, float], int] | None:
        """The fast path; None for CMYK and for files that libjpeg reads only with warnings."""
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return None
        if colorspace in ("CMYK", "YCCK"):
            return None
        _check_pixels(width, height, max_pixels)
        orientation = _jpeg_orientation(data)
        crop_width, crop_height = self._crop_size(width, height, orientation)
        target_width, target_height = self._target_size(orientation)
        gap = REDUCING_GAP * max(target_width / crop_width, target_height / crop_height)
        try:
            # min_factor 2: libjpeg's scales between 1 and 1/2 are slower than decoding it all.
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=int(height * gap), min_width=int(width * gap), min_factor=2
            )
        except ValueError:
            return None
        # libjpeg scales by eighths and rounds up: at a quarter, 1201 columns become 301, of which
        # the last shows one column instead of four.
        scale = round(8 * max(pixels.shape[:2]) / max(height, width)) / 8
        return Image.fromarray(pixels), (width * scale, height * scale), orientation

    def _target_size(self, orientation: int) -> tuple[int, int]:
        return (self.height, self.width) if orientation >= 5 else (self.width, self.height)

    def _crop_size(self, width: float, height: float, orientation: int) -> tuple[float, float]:
        """Width and height of the evaluation crop in raw pixels, before they are made upright."""
        if self.crop_mode == "squash":
            return width * self.crop_fraction, height * self.crop_fraction
        target_width, target_height = self._target_size(orientation)
        pixels_per_target = self.crop_fraction * min(width / target_width, height / target_height)
        return target_width * pixels_per_target, target_height * pixels_per_target

    def _crop(
        self, image: Image.Image, size: tuple[float, float], orientation: int, view: View | None
    ) -> Pixels:
        width, height = size
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
        crop = image.resize(
            self._target_size(orientation),
            _RESAMPLING[self.interpolation],
            box=box,
            reducing_gap=REDUCING_GAP,
        )
        if orientation in _UPRIGHT:
            crop = crop.transpose(_UPRIGHT[orientation])
        if view is not None and view.mirror:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop)


def begins_as(data: bytes) -> str | None:
    """The format whose files begin as `data` does, by at most its first 12 bytes."""
    for (start, offset), name in _MAGIC.items():
        if data.startswith(start, offset):
            return name
    return None


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image is too large: {width}x{height} is {width * height / 1e6:.1f} megapixels, "
            f"the limit is {max_pixels / 1e6:.1f}; make it smaller first"
        )


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 where there is none; without EXIF, Pillow is spared the header."""
    if not _has_exif(data):
        return 1
    try:
        orientation = (
            Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_EXIF_ORIENTATION_TAG, 1)
        )
    # A broken EXIF block says nothing about the pixels; it raises as a broken image does.
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _has_exif(data: bytes) -> bool:
    """Whether a segment before the scan is EXIF (CIPA DC-008, 4.5.4), or segments are malformed."""
    start = 2
    while data[start : start + 1] == b"\xff" and (marker := data[start + 1 : start + 2]) != b"\xda":
        if marker == b"\xe1" and data[start + 4 : start + 10] == b"Exif\x00\x00":
            return True
        # Any number of FF bytes may fill the space before a marker.
        size = int.from_bytes(data[start + 2 : start + 4], "big")
        start += 1 if marker == b"\xff" else 2 + size
    return data[start : start + 1] != b"\xff"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB: transparency over white, of 16 bits the upper 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            "32-bit pixels have no agreed range; save the image with 8 or 16 bits a channel"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
