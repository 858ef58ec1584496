"""Encoded bytes → pixels: the one place that opens an image, in training and in the service.

`open_image` gives the pixels, the size, the orientation and the format, and nobody else parses the
bytes. Metadata never decides over pixels: what does not describe pixels is taken out before the
decoder sees the file, and the orientation is read from it by a parser that cannot fail. JPEG is
decoded by simplejpeg (libjpeg-turbo, scaled decoding), the rest by Pillow.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from models.errors import GraftError

Pixels = npt.NDArray[np.uint8]

# Found by content, never by name. Pillow knows 40 more formats; their parsers are only a risk here.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# And HEIC where pillow-heif, which brings libheif, is installed.
_HEIC = "HEIC"
# How their files begin: (bytes, offset).
_MAGIC = {
    (b"\xff\xd8\xff", 0): "JPEG",
    (b"\x89PNG", 0): "PNG",
    (b"WEBP", 8): "WEBP",
    (b"GIF8", 0): "GIF",
    (b"BM", 0): "BMP",
    (b"II*\x00", 0): "TIFF",
    (b"MM\x00*", 0): "TIFF",
    (b"II+\x00", 0): "TIFF",
    (b"MM\x00+", 0): "TIFF",
}
_PPM = re.compile(rb"P[1-6][\s#]")
# Of a grey or colored one: width, height, and the highest value.
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PPM_HEADER = re.compile(rb"P[2356]" + _GAP + rb"\d+" + _GAP + rb"\d+" + _GAP + rb"(\d{1,5})\b")
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1"}
# So many bytes of a file say its format.
NUM_MAGIC_BYTES = 64

# What stands in place of an image: (how it begins, what it is and the way out).
_STAND_INS = (
    (
        b"version https://git-lfs.github.com/",
        "it is a git-lfs pointer, not the image; fetch the images with git lfs pull",
    ),
    (
        b"/annex/objects/",
        "it is a git-annex pointer, not the image; fetch the images with git annex get",
    ),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
    (
        b"bplist00",
        "it is a placeholder of iCloud or a property list, not the image; download the image first",
    ),
)
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body")
_ZEROS = (
    "it holds nothing but zero bytes: a placeholder of OneDrive or another cloud drive, or a "
    "broken copy; download the image first (Always keep on this device)"
)

# The limit of training and of the service, checked in the header, before a pixel is decoded:
# Pillow's own, about 256 MiB of RGB.
MAX_PIXELS = 89_478_485
MAX_PIXELS_VARIABLE = "GRAFT_MAX_PIXELS"

# What makes raw pixels upright, by EXIF orientation (CIPA DC-008, 4.6.5.1.6); 5 to 8 swap height
# and width.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_XMP_TAG = 700
_TIFF_BITS_TAG = 258
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|\s*>)\s*([1-8])\b""")
# As much of a compressed text is read.
_MAX_TEXT_BYTES = 2**20
# So many rows of a transparent image are put over white at once.
_STRIP_ROWS = 64
_END_OF_JPEG = b"\xff\xd9"
_END_OF_PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# Tags of TIFF that decide how its pixels are decoded.
_TIFF_PIXEL_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, _ORIENTATION_TAG, 277, 278, 279, 284, 292, 293),
    *(301, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), *range(529, 533)),
}

# Our own limit is checked right after the header is read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(GraftError):
    """The bytes cannot be decoded as an image; the message says why."""


class ImageTooLargeError(ImageError):
    """The header names more pixels than the limit."""


@dataclass(frozen=True)
class OpenedImage:
    """What a file holds: all that anybody needs to know of it.

    `pixels` are RGB and as stored: `orientation` makes them upright, and they may be decoded at
    `scale` of `width` and `height`. `values` are the lowest and the highest value of 16 bits
    a channel, None for 8 bits.
    """

    pixels: Image.Image
    width: int
    height: int
    orientation: int
    format: str
    scale: float = 1.0
    values: tuple[int, int] | None = None


def _whole(width: int, height: int, orientation: int) -> float:
    return 1.0


def open_image(
    data: bytes,
    *,
    max_pixels: int | None = None,
    min_scale: Callable[[int, int, int], float] = _whole,
    stretch: bool = False,
) -> OpenedImage:
    """Decode `data`, a file in one of FORMATS, in HEIC too where pillow-heif is installed.

    `max_pixels` defaults to `read_max_pixels()`. `min_scale` gives, for the stored width, height
    and orientation, the scale that suffices. `stretch` spreads the values that an image of 16 bits
    a channel uses over the whole range. Raises ImageError where `data` is no such image, and
    ImageTooLargeError where it has over `max_pixels`.
    """
    limit = read_max_pixels() if max_pixels is None else max_pixels
    if not data:
        raise ImageError("the file is empty")
    name = begins_as(data)
    if name is None:
        raise ImageError(_describe_unknown(data))
    try:
        if name == "JPEG":
            return _open_jpeg(data, limit, min_scale)
        return _open_with_pillow(data, name, limit, stretch)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"it begins as a {name} does, but is cut short or damaged ({len(data):,} bytes)"
        ) from None
    except Image.DecompressionBombError:
        # Pillow's own check comes before ours, at twice its limit.
        claim = f"it claims over {2 * MAX_PIXELS / 1e6:.0f} megapixels"
        raise ImageTooLargeError(_describe_too_large(claim, limit)) from None
    # On hostile bytes Pillow's plugins raise nearly anything (struct.error, MemoryError …).
    except Exception as error:
        raise ImageError(f"it cannot be decoded: {error}") from error


def begins_as(data: bytes) -> str | None:
    """The format whose files begin as `data` does, by at most its first NUM_MAGIC_BYTES."""
    for (start, offset), name in _MAGIC.items():
        if data.startswith(start, offset):
            return name
    if _PPM.match(data):
        return "PPM"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), NUM_MAGIC_BYTES)
        brands = {data[8:12], *(data[place : place + 4] for place in range(16, size, 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return _HEIC
    return None


def is_wide(data: bytes) -> bool:
    """Whether the header of a PNG, TIFF, PGM or PPM says more than 8 bits a channel."""
    name = begins_as(data)
    if name == "PNG":
        return data[24:25] == b"\x10"
    if header := _PPM_HEADER.match(data):
        return int(header[1]) > 255
    if name != "TIFF" or len(data) < 8:
        return False
    order = "<" if data[:2] == b"II" else ">"
    for tag, _, count, value in _tiff_entries(data, order):
        if tag == _TIFF_BITS_TAG:
            is_inline = 2 * count <= len(value)
            place = 0 if is_inline else _tiff_number(value, order)
            bits = (value if is_inline else data)[place : place + 2]
            return bits == struct.pack(order + "H", 16)
    return False


def read_max_pixels() -> int:
    """The most pixels of an image: GRAFT_MAX_PIXELS, as for the service, else MAX_PIXELS.

    Raises GraftError where that is not a whole number above 0.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise GraftError(f"{MAX_PIXELS_VARIABLE}={text}: it must be a whole number of at least 1")
    return int(text)


def _describe_unknown(data: bytes) -> str:
    for start, words in _STAND_INS:
        if data.startswith(start):
            return words
    if not data.strip(b"\x00"):
        return _ZEROS
    what = f"not an image (it starts with {data[:12]!r})"
    if data[:NUM_MAGIC_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        what = f"it is a web page (HTML), {what}; download the image file itself"
    return f"{what}; readable are {', '.join(FORMATS)}"


def _describe_too_large(size: str, limit: int) -> str:
    most = f"{limit:,}" if size.endswith(" pixels") else f"{limit / 1e6:.1f}"
    return (
        f"it is too large: {size}, the limit is {most}; make it smaller first, "
        f"or set {MAX_PIXELS_VARIABLE}, for the service too"
    )


def _check_pixels(width: int, height: int, limit: int) -> None:
    number = width * height
    if number > limit:
        size = f"{width}x{height} is {number / 1e6:.1f} megapixels"
        # Rounded, both may look the same.
        if limit < 100_000 or f"{number / 1e6:.1f}" == f"{limit / 1e6:.1f}":
            size = f"{width}x{height} is {number:,} pixels"
        raise ImageTooLargeError(_describe_too_large(size, limit))


def _open_jpeg(data: bytes, limit: int, min_scale: Callable[[int, int, int], float]) -> OpenedImage:
    orientation = _jpeg_orientation(data)
    # Without its last two bytes, the end marker, a file may hold the whole picture: libjpeg gives
    # no warning once they are put there, and one where pixels are missing.
    for whole in (data, data + _END_OF_JPEG):
        if whole is not data and not _has_all_scans(data):
            break
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(whole)
            _check_pixels(width, height, limit)
            if colorspace in ("CMYK", "YCCK"):
                # Pillow, which turns CMYK into RGB, gives no warnings.
                simplejpeg.decode_jpeg(whole, "CMYK")
                return _open_with_pillow(whole, "JPEG", limit, False)
            scale = min_scale(width, height, orientation)
            # min_factor 2: libjpeg's scales between 1 and 1/2 are slower than decoding it all.
            pixels = simplejpeg.decode_jpeg(
                whole,
                "RGB",
                min_height=int(height * scale),
                min_width=int(width * scale),
                min_factor=2,
            )
        except ImageError:
            raise
        except ValueError:
            continue
        # libjpeg scales by eighths and rounds up: at a quarter, 1201 columns become 301, of which
        # the last shows one column instead of four.
        scale = round(8 * max(pixels.shape[:2]) / max(height, width)) / 8
        return OpenedImage(Image.fromarray(pixels), width, height, orientation, "JPEG", scale)
    # libjpeg reads some files only with warnings.
    return _open_with_pillow(data, "JPEG", limit, False)


def _open_with_pillow(data: bytes, name: str, limit: int, stretch: bool) -> OpenedImage:
    pixels_only, orientation = _SEPARATE.get(name, _no_metadata)(data)
    if name == _HEIC:
        _register_heic()
        name_in_pillow = "HEIF"
    else:
        name_in_pillow = name
    image: Image.Image = Image.open(io.BytesIO(pixels_only), formats=(name_in_pillow,))
    width, height = image.size
    _check_pixels(width, height, limit)
    if width < 1 or height < 1:
        raise ImageError(f"it has no pixels: {width}x{height}")
    bits = _bits_per_channel(image)
    image.load()
    if name in ("GIF", "AVIF", _HEIC):
        # AVIF and HEIC turn by properties of their own, which Pillow shows as EXIF.
        orientation = _orientation(image.info.get("exif"), image.info.get("xmp"))
    # Pillow's TIFF reader turns the pixels itself, and the size with them.
    rgb, values = _to_rgb(image, name, bits, stretch)
    return OpenedImage(rgb, *image.size, orientation, name, values=values)


def _bits_per_channel(image: Image.Image) -> int:
    """8, 12 or 16, by how Pillow is about to decode the pixels."""
    tiles = getattr(image, "tile", ())
    arguments = tiles[0].args if tiles else ""
    if image.format == "PPM" and isinstance(arguments, tuple) and isinstance(arguments[-1], int):
        # The highest value that the header names.
        return 16 if arguments[-1] > 255 else 8
    raw_modes = str(arguments)
    return next((bits for bits in (12, 16) if f";{bits}" in raw_modes), 8)


def _to_rgb(
    image: Image.Image, name: str, bits: int, stretch: bool
) -> tuple[Image.Image, tuple[int, int] | None]:
    """Any of Pillow's modes to RGB, transparency over white; and the values that 16 bits take."""
    if image.mode.startswith("I;16") or (image.mode == "I" and name == "PPM"):
        return _wide_grey_to_rgb(image, bits, stretch)
    if image.mode in ("I", "F"):
        raise ImageError(
            "32-bit pixels have no agreed range; save the image with 8 or 16 bits a channel"
        )
    rgb = _narrow_to_rgb(image)
    if bits == 8:
        return rgb, None
    # Of 16 bits a colour, Pillow keeps the upper 8.
    extrema = np.asarray(rgb)
    low, high = int(extrema.min()), int(extrema.max())
    return (_stretch(extrema, low, high) if stretch else rgb), (low * 257, high * 257)


def _narrow_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _composite_over_white(image)
    return image.convert("RGB")


def _composite_over_white(image: Image.Image) -> Image.Image:
    """In strips: whole, its copies take 1.6 GB at 88 megapixels, four times the image."""
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP_ROWS):
        box = (0, top, image.width, min(top + _STRIP_ROWS, image.height))
        rgba = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, rgba).convert("RGB"), box)
    return rgb


def _wide_grey_to_rgb(
    image: Image.Image, bits: int, stretch: bool
) -> tuple[Image.Image, tuple[int, int] | None]:
    values = np.asarray(image)
    if bits == 12:
        values = values << 4
    low, high = int(values.min()), int(values.max())
    stretched = _stretch(values, low, high) if stretch else None
    grey = (values >> 8).astype(np.uint8) if stretched is None else np.asarray(stretched)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB"), (low, high)


def _stretch(values: npt.NDArray[np.integer], low: int, high: int) -> Image.Image:
    """Values from `low` to `high` to 0 to 255."""
    spread = (values.astype(np.float32) - low) * (255 / max(high - low, 1))
    return Image.fromarray(np.rint(spread).astype(np.uint8))


@cache
def _register_heic() -> None:
    if find_spec("pillow_heif") is None:
        raise ImageError(
            "it is a HEIC image, which needs the package pillow-heif (pip install pillow-heif, "
            "where it is trained and where it is served); or convert it to JPEG"
        )
    importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)


def _orientation(exif: object, xmp: object) -> int:
    """The one rule of all formats: EXIF's orientation, else XMP's, else 1."""
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None and isinstance(xmp, bytes):
        match = _XMP_ORIENTATION.search(xmp)
        found = None if match is None else int(match[1])
    return 1 if found is None else found


def _exif_orientation(block: bytes) -> int | None:
    """The orientation of an EXIF block, a TIFF header and its first folder; None without one."""
    block = block.removeprefix(b"Exif\x00\x00").removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return None
    for tag, kind, count, value in _tiff_entries(block, order):
        if tag == _ORIENTATION_TAG and count == 1 and kind in (1, 3, 4):
            size = {1: "B", 3: "H", 4: "I"}[kind]
            (orientation,) = struct.unpack_from(order + size, value)
            return orientation if 1 <= orientation <= 8 else None
    return None


@dataclass(frozen=True)
class _TiffFolder:
    """Where the first folder of a TIFF begins, and the types of its counts and offsets."""

    start: int
    num_entries: str
    offset: str

    @property
    def offset_bytes(self) -> int:
        return struct.calcsize(self.offset)


def _find_tiff_folder(data: bytes, order: str) -> _TiffFolder | None:
    """In BigTIFF counts and offsets have 8 bytes; None where the header is cut short."""
    if len(data) < 8:
        return None
    if struct.unpack_from(order + "H", data, 2)[0] != 43:
        return _TiffFolder(struct.unpack_from(order + "I", data, 4)[0], order + "H", order + "I")
    if len(data) < 16:
        return None
    return _TiffFolder(struct.unpack_from(order + "Q", data, 8)[0], order + "Q", order + "Q")


def _tiff_entries(data: bytes, order: str) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, value or its offset) of the first folder, as far as it goes."""
    folder = _find_tiff_folder(data, order)
    if folder is None:
        return
    place = folder.start + struct.calcsize(folder.num_entries)
    if place > len(data):
        return
    (count,) = struct.unpack_from(folder.num_entries, data, folder.start)
    width = folder.offset_bytes
    size = 4 + 2 * width
    for start in range(place, min(place + size * count, len(data) - size + 1), size):
        tag, kind = struct.unpack_from(order + "HH", data, start)
        (number,) = struct.unpack_from(folder.offset, data, start + 4)
        yield tag, kind, number, data[start + 4 + width : start + size]


def _tiff_number(value: bytes, order: str) -> int:
    """The offset that stands in place of a value."""
    return int.from_bytes(value, "little" if order == "<" else "big")


def _no_metadata(data: bytes) -> tuple[bytes, int]:
    return data, 1


def _jpeg_orientation(data: bytes) -> int:
    exif, xmp = b"", b""
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\x00\x00"):
            exif += body[6:]
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\x00"):
            xmp += body
    return _orientation(exif, xmp)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments before the first scan, and of the scan's own."""
    place = 2
    while (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        marker = data[place + 1]
        # Any number of FF bytes may fill the space before a marker.
        if marker == 0xFF:
            place += 1
        # TEM and RST have no content (ITU-T T.81, B.1.1.3).
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            place += 2
        else:
            end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
            yield marker, place, end
            if marker == 0xDA:
                return
            place = end


def _has_all_scans(data: bytes) -> bool:
    """Whether every coefficient of every component is in some scan, to its last bit.

    Of a progressive file whose last scans are missing, libjpeg gives a coarser picture without a
    warning (ITU-T T.81, G.1.1.1).
    """
    place = next((start for marker, start, _ in _jpeg_segments(data) if marker == 0xDA), len(data))
    missing: dict[int, set[int]] = {}
    for marker, start, end in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            missing = {component: set(range(64)) for component in data[start + 10 : end : 3]}
    while place >= 0:
        num, scan = data[place + 4 : place + 5], data[place + 5 :][:11]
        size = 2 * num[0] if num else 0
        if len(scan) < size + 3 or size == 0:
            return False
        if scan[size + 2] & 15 == 0:
            for component in scan[:size:2]:
                missing.get(component, set()).difference_update(
                    range(scan[size], scan[size + 1] + 1)
                )
        place = data.find(b"\xff\xda", place + 2)
    return bool(missing) and not any(missing.values())


def _separate_jpeg(data: bytes) -> tuple[bytes, int]:
    """Without the segments of applications, but for those that say how colors are stored."""
    kept, orientation = [data[:2]], _jpeg_orientation(data)
    for marker, start, end in _jpeg_segments(data):
        segment = data[start:end]
        if marker == 0xDA:
            kept.append(data[start:])
        elif marker == 0xE0 and segment[4:9] == b"JFIF\x00":
            # With the density left out: Pillow reads it.
            kept.append(b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00")
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (
            marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16
        ):
            kept.append(segment)
    return b"".join(kept), orientation


def _separate_png(data: bytes) -> tuple[bytes, int]:
    """The chunks that decide pixels, and the orientation that the others name.

    As libpng does, an ancillary chunk with a wrong checksum is ignored, tRNS too. Of an animation
    the first picture is left.
    """
    view = memoryview(data)
    kept, exif, xmp, place = [view[:8]], b"", b"", 8
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + size
        if kind == b"IEND" or not kind.isalpha():
            break
        if not kind[0] & 0x20:
            kept.append(view[place:end])
        elif zlib.crc32(view[place + 4 : end - 4]).to_bytes(4, "big") == view[end - 4 : end]:
            body = bytes(view[place + 8 : end - 4])
            if kind == b"tRNS" and _is_png_transparency(data, body):
                kept.append(view[place:end])
            elif kind == b"eXIf":
                exif = exif or body
            elif kind in (b"tEXt", b"zTXt", b"iTXt"):
                key, text = _png_text(kind, body)
                if key == b"Raw profile type exif":
                    exif = exif or _raw_profile(text)
                elif key == b"XML:com.adobe.xmp":
                    xmp = xmp or text
        place = end
    # Where a chunk is cut short, the end would be taken for a part of it.
    if place <= len(data):
        kept.append(memoryview(_END_OF_PNG))
    return b"".join(kept), _orientation(exif, xmp)


def _is_png_transparency(data: bytes, body: bytes) -> bool:
    """Whether a tRNS has the size that the color type of the header asks for."""
    color_type = data[25] if len(data) > 25 else 0
    return {0: len(body) == 2, 2: len(body) == 6, 3: 0 < len(body) <= 256}.get(color_type, False)


def _png_text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The keyword and the text of tEXt, zTXt or iTXt; the text is empty where it is broken."""
    key, _, rest = body.partition(b"\x00")
    is_compressed = kind == b"zTXt"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        is_compressed = rest[:1] == b"\x01"
        rest = rest[2:].partition(b"\x00")[2].partition(b"\x00")[2]
    if is_compressed and key in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
        try:
            rest = zlib.decompressobj().decompress(rest, _MAX_TEXT_BYTES)
        except zlib.error:
            rest = b""
    return key, rest


def _raw_profile(text: bytes) -> bytes:
    """ImageMagick's: a line break, a name, a length, and lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _separate_webp(data: bytes) -> tuple[bytes, int]:
    """The chunks that decide pixels; the file itself where it has no others."""
    kept, place = [], 12
    metadata: dict[bytes, bytes] = {}
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + size + (size & 1)
        if kind in (b"ICCP", b"EXIF", b"XMP "):
            metadata.setdefault(kind, data[place + 8 : place + 8 + size])
        elif kind == b"VP8X" and size >= 1:
            # Its flags no longer announce ICC, EXIF and XMP.
            flags = data[place + 8] & ~0x2C
            kept.append(data[place : place + 8] + bytes([flags]) + data[place + 9 : end])
        else:
            kept.append(data[place:end])
        place = end
    orientation = _orientation(metadata.get(b"EXIF"), metadata.get(b"XMP "))
    if not metadata:
        return data, orientation
    chunks = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks, orientation


def _separate_tiff(data: bytes) -> tuple[bytes, int]:
    """With the tags alone that decide pixels; Pillow turns the pixels by the orientation's."""
    order = "<" if data[:2] == b"II" else ">"
    layout = _find_tiff_folder(data, order)
    entries = list(_tiff_entries(data, order))
    kept = [entry for entry in entries if entry[0] in _TIFF_PIXEL_TAGS]
    if layout is None or not kept:
        return data, 1
    orientation = 1
    if all(tag != _ORIENTATION_TAG for tag, *_ in kept):
        for tag, _, count, value in entries:
            if tag == _XMP_TAG:
                place = _tiff_number(value, order)
                orientation = _orientation(None, data[place : place + count])
    folder = struct.pack(layout.num_entries, len(kept)) + b"".join(
        struct.pack(order + "HH", tag, kind) + struct.pack(layout.offset, count) + value
        for tag, kind, count, value in kept
    )
    # The folders of other pages, of thumbnails and of EXIF are not reached.
    folder += bytes(layout.offset_bytes)
    end = layout.start + len(folder)
    return data[: layout.start] + folder + data[end:], orientation


def _separate_avif(data: bytes) -> tuple[bytes, int]:
    """With the EXIF item under a name that nobody looks for: Pillow refuses a broken one, and the
    orientation of AVIF is a property of the image (ISO/IEC 23000-22, 7.3.6.7)."""
    return re.sub(rb"(?s)(infe.{8}(?:..)?)Exif", rb"\1Exix", data), 1


_SEPARATE: dict[str, Callable[[bytes], tuple[bytes, int]]] = {
    "JPEG": _separate_jpeg,
    "PNG": _separate_png,
    "WEBP": _separate_webp,
    "TIFF": _separate_tiff,
    "AVIF": _separate_avif,
}
