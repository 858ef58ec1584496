"""Every format, orientation and mode gives its crop; what is broken or hostile gives ImageError."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from models.errors import GraftError
from models.images import FORMATS, MAX_PIXELS, ImageError, Pixels, begins_as
from models.preprocess import FITS, Fit, Preprocess, View

PREPROCESS = Preprocess(height=48, width=48, crop_fraction=1.0)
# Pillow says so where an EXIF block is broken; what matters here is the crop.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def picture(width: int = 120, height: int = 80) -> Image.Image:
    """A smooth image, different in each of its eight orientations.

    Red grows to the right, green downwards, and the upper left corner is blue.
    """
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 255 * np.exp(-8 * (x**2 + y**2))], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "WEBP" and "quality" not in options:
        options["lossless"] = True
    if kind == "AVIF":
        options = {"quality": 100, "subsampling": "4:4:4", "speed": 10, **options}
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(one: Pixels, other: Pixels) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


def plain_crop(image: Image.Image, preprocess: Preprocess = PREPROCESS) -> Pixels:
    """The crop as Pillow makes it in the plainest way: crop, then resize."""
    scale = preprocess.crop_fraction * min(
        image.width / preprocess.width, image.height / preprocess.height
    )
    width, height = preprocess.width * scale, preprocess.height * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return np.asarray(
        image.resize((preprocess.width, preprocess.height), Image.Resampling.BICUBIC, box=box)
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_crop(kind: str) -> None:
    crop = PREPROCESS(encode(picture(), kind))
    assert crop.dtype == np.uint8
    # GIF has a palette of 256 colours for a picture of thousands.
    assert difference(crop, plain_crop(picture())) < (8 if kind == "GIF" else 1.5)


def test_a_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (60, 60), color) for color in ("red", "blue", "green")]
    crop = PREPROCESS(
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    )
    assert crop.reshape(-1, 3).mean(axis=0).tolist() == [255, 0, 0]


UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    # Where the viewer must turn the image by 90° clockwise, the camera stored it turned by 90°
    # counter-clockwise, and so on.
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(48, 48), (32, 64), (64, 32)])
def test_exif_orientation_is_undone(kind: str, orientation: int, size: tuple[int, int]) -> None:
    preprocess = Preprocess(height=size[0], width=size[1], crop_fraction=0.9)
    stored = UPRIGHT[orientation](picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    crop = preprocess(encode(stored, kind, exif=exif))
    assert difference(crop, preprocess(encode(picture(), "PNG"))) < 1.5


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_counts_as_none(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        assert (
            difference(
                PREPROCESS(encode(picture(), kind, exif=exif)), PREPROCESS(encode(picture(), kind))
            )
            == 0
        )


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00",
        b"Exif\x00\x00garbage that is no TIFF header",
        b"Exif\x00\x00MM\x00*\xff\xff\xff\xff",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + b"\x12\x01\x03\x00\xff\xff\xff\xff" * 4,
    ],
)
def test_a_broken_exif_block_does_not_cost_the_picture(exif: bytes) -> None:
    data = encode(picture(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert difference(PREPROCESS(data[:2] + segment + data[2:]), PREPROCESS(data)) == 0


def halves_over_white() -> Image.Image:
    """Left half red and opaque, right half black and transparent."""
    image = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 40, 80))
    return image


def assert_red_on_white(crop: Pixels) -> None:
    assert np.abs(crop[:, :20].astype(int) - (255, 0, 0)).max() <= 2
    assert np.abs(crop[:, 28:].astype(int) - 255).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgba_transparency_shows_white(kind: str) -> None:
    assert_red_on_white(PREPROCESS(encode(halves_over_white(), kind)))


def test_half_transparent_pixels_blend_with_white() -> None:
    crop = PREPROCESS(encode(Image.new("RGBA", (50, 50), (255, 0, 0, 128)), "PNG"))
    assert np.abs(crop.astype(int) - (255, 127, 127)).max() <= 1


def test_grey_with_alpha_shows_white() -> None:
    crop = PREPROCESS(
        encode(Image.merge("LA", [Image.new("L", (50, 50), 0), Image.new("L", (50, 50), 0)]), "PNG")
    )
    assert crop.min() == 255


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_entry_shows_white(kind: str) -> None:
    image = Image.new("P", (80, 80), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(0, (0, 0, 40, 80))
    assert_red_on_white(PREPROCESS(encode(image, kind, transparency=1)))


def test_rgb_with_a_transparent_color_shows_white() -> None:
    image = Image.new("RGB", (80, 80), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, 40, 80))
    data = encode(image, "PNG", transparency=(0, 0, 0))
    assert b"tRNS" in data
    assert_red_on_white(PREPROCESS(data))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    cmyk = picture().convert("CMYK")
    assert difference(PREPROCESS(encode(cmyk, kind)), plain_crop(picture())) < 3


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "JPEG"),
        ("L", "PNG"),
        ("L", "BMP"),
        ("L", "TIFF"),
        ("L", "GIF"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("P", "BMP"),
    ],
)
def test_grey_and_palette_become_rgb(mode: str, kind: str) -> None:
    image = picture().convert("L") if mode == "L" else picture().quantize(256)
    crop = PREPROCESS(encode(image, kind))
    assert crop.shape == (48, 48, 3)
    assert difference(crop, plain_crop(image.convert("RGB"))) < 1.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_one_bit_pictures_become_black_and_white(kind: str) -> None:
    image = Image.new("1", (80, 80), 0)
    image.paste(1, (40, 0, 80, 80))
    crop = PREPROCESS(encode(image, kind))
    assert crop[:, :20].max() == 0
    assert crop[:, 28:].min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_eight_bits(kind: str) -> None:
    grey = np.asarray(picture().convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    crop = PREPROCESS(encode(wide, kind))
    assert difference(crop, PREPROCESS(encode(Image.fromarray(grey), kind))) <= 1


def test_sixteen_bit_rgb_png_keeps_its_upper_eight_bits() -> None:
    pixels = (np.asarray(picture()).astype(">u2") * 257).astype(">u2")
    assert difference(PREPROCESS(sixteen_bit_png(pixels)), plain_crop(picture())) < 1.5


def sixteen_bit_png(pixels: np.ndarray[Any, Any]) -> bytes:
    height, width, _ = pixels.shape
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_floating_point_pixels_are_refused_in_words() -> None:
    with pytest.raises(ImageError, match="32-bit pixels"):
        PREPROCESS(encode(Image.new("F", (20, 20), 0.5), "TIFF"))


def test_the_crop_is_the_middle_at_the_crop_fraction() -> None:
    preprocess = Preprocess(height=50, width=50, crop_fraction=0.5)
    image = Image.new("RGB", (200, 100), "black")
    image.paste((255, 255, 255), (75, 25, 125, 75))
    assert preprocess(encode(image, "PNG")).min() == 255
    wider = Preprocess(height=50, width=50, crop_fraction=0.6)
    assert wider(encode(image, "PNG"))[:, 0].max() < 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 32)])
def test_non_square_targets_keep_the_aspect_ratio(kind: str, height: int, width: int) -> None:
    preprocess = Preprocess(height=height, width=width, crop_fraction=0.8)
    crop = preprocess(encode(picture(300, 200), kind))
    assert crop.shape == (height, width, 3)
    assert difference(crop, plain_crop(picture(300, 200), preprocess)) < 1.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_squash_shows_the_whole_picture(kind: str) -> None:
    preprocess = Preprocess(height=40, width=40, crop_fraction=1.0, crop_mode="squash")
    expected = np.asarray(picture(400, 100).resize((40, 40), Image.Resampling.BICUBIC))
    assert difference(preprocess(encode(picture(400, 100), kind)), expected) < 1.5


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3)])
def test_tiny_pictures_are_enlarged(kind: str, size: tuple[int, int]) -> None:
    crop = PREPROCESS(encode(Image.new("RGB", size, (200, 100, 50)), kind))
    assert crop.shape == (48, 48, 3)
    assert np.abs(crop.astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (3000, 1)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_extreme_aspect_ratios_are_decoded(
    kind: str, size: tuple[int, int], crop_mode: Any
) -> None:
    preprocess = Preprocess(height=48, width=48, crop_mode=crop_mode)
    crop = preprocess(encode(Image.new("RGB", size, (200, 100, 50)), kind))
    assert np.abs(crop.astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("size", [(1600, 1200), (1201, 803), (403, 1207), (100, 100), (49, 50)])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_jpeg_path_agrees_with_a_full_decode(
    size: tuple[int, int], subsampling: int, progressive: bool
) -> None:
    preprocess = Preprocess(height=96, width=96)
    generator = np.random.default_rng(0)
    texture = Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    data = encode(texture, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    assert difference(preprocess(data), plain_crop(full, preprocess)) < 2.0


def test_views_shift_scale_and_mirror() -> None:
    data = encode(picture(200, 200), "PNG")
    preprocess = Preprocess(height=50, width=50, crop_fraction=0.5)
    plain = preprocess(data)
    assert np.array_equal(preprocess(data, view=View()), plain)
    assert np.array_equal(preprocess(data, view=View(mirror=True)), plain[:, ::-1])
    # Red grows to the right over 200 pixels: a quarter of the crop's 100 is 25 of them.
    assert preprocess(data, view=View(center_x=0.25))[..., 0].mean() - plain[
        ..., 0
    ].mean() == pytest.approx(255 * 25 / 200, abs=2)
    assert preprocess(data, view=View(center_y=-0.25))[..., 1].mean() - plain[
        ..., 1
    ].mean() == pytest.approx(-255 * 25 / 200, abs=2)
    assert np.ptp(preprocess(data, view=View(scale=0.5))[25, :, 0]) == pytest.approx(
        np.ptp(plain[25, :, 0]) / 2, abs=3
    )
    outside = preprocess(data, view=View(center_x=5, center_y=-5, scale=9))
    assert outside.shape == (50, 50, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_decoding_is_deterministic(kind: str) -> None:
    data = encode(picture(700, 500), kind)
    assert np.array_equal(PREPROCESS(data), PREPROCESS(data))


def test_the_record_survives_a_round_trip() -> None:
    preprocess = Preprocess(
        height=64,
        width=96,
        crop_fraction=0.9,
        crop_mode="squash",
        interpolation="bilinear",
        mean=(0.5, 0.4, 0.3),
    )
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert isinstance(
        Preprocess.from_dict({**preprocess.to_dict(), "mean": [0.5, 0.4, 0.3]}).mean, tuple
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"hello, I am a text file\n" * 50,
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10">'
        b'<rect width="10" height="10"/></svg>',
        b"%PDF-1.7\n" + b"\x00" * 100,
        b"\xff\xd8\xff",
        b"\xff\xd8\xff" + b"\x00" * 200,
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM" + b"\xff" * 60,
        b"II*\x00" + b"\xff" * 60,
        b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\x00" * 40,
        bytes(range(256)) * 8,
    ],
)
def test_what_is_no_image_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        PREPROCESS(data)
    assert str(caught.value)


def test_an_empty_file_is_said_to_be_empty() -> None:
    with pytest.raises(ImageError, match="empty"):
        PREPROCESS(b"")


def test_text_is_answered_with_how_it_starts_and_what_is_readable() -> None:
    with pytest.raises(ImageError, match=r"<!DOCTYPE ht.*JPEG, PNG, WEBP, GIF, BMP, TIFF"):
        PREPROCESS(b"<!DOCTYPE html><html></html>")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_ends_in_its_header_is_told_from_no_image(kind: str) -> None:
    data = encode(picture(), kind)
    assert begins_as(data) == kind
    with pytest.raises(ImageError) as caught:
        PREPROCESS(data[:14])
    assert "not an image" not in str(caught.value)


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "JPEG2000"])
def test_formats_outside_the_list_are_refused(kind: str) -> None:
    with pytest.raises(ImageError):
        PREPROCESS(encode(picture(), kind))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.8])
def test_a_truncated_file_is_an_image_error(kind: str, share: float) -> None:
    generator = np.random.default_rng(1)
    data = encode(Image.fromarray(generator.integers(0, 256, (90, 90, 3), np.uint8)), kind)
    with pytest.raises(ImageError):
        PREPROCESS(data[: int(len(data) * share)])


def bomb(kind: str) -> bytes:
    """A small file that claims 50,000 x 50,000 pixels, or WebP's most, 16,383 x 16,383."""
    side = 50_000
    data = bytearray(encode(picture(64, 64), kind))
    if kind == "PNG":
        return (
            bytes(data[:8])
            + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            + bytes(data[33:])
        )
    if kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "WEBP":
        canvas = struct.pack("<I", 16_382)[:3]
        extended = b"VP8X" + struct.pack("<I", 10) + b"\x00" * 4 + canvas + canvas
        data[12:12] = extended
        data[4:8] = struct.pack("<I", len(data) - 8)
    elif kind == "PPM":
        return bytes(data).replace(b"64 64", b"50000 50000")
    elif kind == "AVIF":
        size = data.index(b"ispe") + 8
        data[size : size + 8] = struct.pack(">II", 16_000, 16_000)
    else:
        data = bytearray(encode(picture(64, 64), "TIFF"))
        first = struct.unpack_from("<I", data, 4)[0]
        for entry in range(
            first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12
        ):
            tag = struct.unpack_from("<H", data, entry)[0]
            if tag in (256, 257):
                struct.pack_into("<HHII", data, entry, tag, 4, 1, side)
    return bytes(data)


@pytest.mark.alone
@pytest.mark.parametrize("kind", FORMATS)
def test_a_bomb_is_refused_from_its_header(kind: str) -> None:
    data = bomb(kind)
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with pytest.raises(ImageError, match=r"too large: .* the limit is 89\S*; make it smaller"):
        PREPROCESS(data)
    assert time.perf_counter() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 64 * 1024


def test_a_text_bomb_in_a_png_is_not_read() -> None:
    data = encode(picture(), "PNG")
    text = chunk(b"zTXt", b"note\x00\x00" + zlib.compress(b"x" * 20_000_000))
    for place in (33, len(data) - 12):
        crop = PREPROCESS(data[:place] + text + data[place:])
        assert np.array_equal(crop, PREPROCESS(data))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_limit_on_pixels_is_the_callers_to_lower(kind: str) -> None:
    data = encode(picture(100, 100), kind)
    assert PREPROCESS(data, max_pixels=10_000).shape == (48, 48, 3)
    with pytest.raises(ImageError, match="too large: 100x100"):
        PREPROCESS(data, max_pixels=9_999)


def test_the_limit_allows_the_cameras_of_today() -> None:
    assert MAX_PIXELS > 8_000 * 11_000


def damage_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(generator.integers(1, 12))):
        damaged[int(generator.integers(len(damaged)))] = int(generator.integers(256))
    return bytes(damaged)


def damage_header(data: bytes, generator: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(generator.integers(1, 5))):
        damaged[int(generator.integers(min(80, len(damaged))))] = int(generator.integers(256))
    return bytes(damaged)


def cut_out(data: bytes, generator: np.random.Generator) -> bytes:
    start, end = sorted(generator.integers(0, len(data), 2).tolist())
    return data[:start] + data[end:]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", [damage_bytes, damage_header, cut_out])
def test_damaged_files_give_a_crop_or_an_image_error(
    kind: str, damage: Callable[[bytes, np.random.Generator], bytes]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = encode(picture(60, 40), kind, **options)
    generator = np.random.default_rng(FORMATS.index(kind))
    num_errors = 0
    for _ in range(60):
        damaged = damage(data, generator)
        try:
            crop = PREPROCESS(damaged, max_pixels=4_000_000)
        except ImageError:
            num_errors += 1
            continue
        assert crop.shape == (48, 48, 3), damaged
        assert crop.dtype == np.uint8
    assert num_errors > 0


def test_an_image_error_is_one_a_person_can_mend() -> None:
    assert issubclass(ImageError, GraftError)


def test_decoding_engines_and_checkpoints_need_no_torch(run_python: Any, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['timm'] = None\n"
        "import models.preprocess, models.engine.engine, models.checkpoint, models.prepared\n"
        "preprocess = models.preprocess.Preprocess(height=8, width=8)\n"
        "print(preprocess(open(sys.argv[1], 'rb').read()).shape)"
    )
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(picture(), "JPEG"))
    done = run_python(program, str(path))
    assert (done.stdout.strip(), done.stderr) == ("(8, 8, 3)", "")


# Pillow's plainest way for each fit: which part of the picture, and where on the canvas it goes.
def plainly_fitted(image: Image.Image, fit: Fit, side: int) -> Pixels:
    width, height = image.size
    if fit == "squash":
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    if fit == "pad":
        scale = side / max(width, height)
        margins = [round((side - scale * length) / 2) for length in (width, height)]
        size = (max(1, side - 2 * margins[0]), max(1, side - 2 * margins[1]))
        canvas = Image.new("RGB", (side, side), (124, 116, 104))  # ImageNet's mean
        small = image.resize(size, Image.Resampling.BICUBIC)
        canvas.paste(small, (margins[0], margins[1]))
        return np.asarray(canvas)
    return plain_crop(image, Preprocess(side, side, 0.875 if fit == "crop" else 1.0))


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (97, 31), (31, 200), (64, 64), (3, 90)])
@pytest.mark.parametrize("fit", FITS)
def test_each_fit_is_what_pillow_makes_of_it(fit: Fit, size: tuple[int, int]) -> None:
    crop = Preprocess(48, 48).fitted(fit)(encode(picture(*size), "PNG"))
    assert difference(crop, plainly_fitted(picture(*size), fit, 48)) < 2.5


@pytest.mark.parametrize("size", [(150, 60), (60, 150), (500, 375)])
@pytest.mark.parametrize("fit", FITS)
def test_timms_transform_makes_the_same_square(fit: Fit, size: tuple[int, int]) -> None:
    preprocess = Preprocess(96, 96).fitted(fit)
    transform: Any = create_transform(
        (3, 96, 96),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_fraction,
        crop_mode=preprocess.crop_mode,
        normalize=False,
    )
    expected = np.asarray(transform(picture(*size))).transpose(1, 2, 0)
    # timm cuts after resizing, to whole pixels.
    assert difference(preprocess(encode(picture(*size), "PNG")), expected) < 1.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", FITS)
def test_each_fit_turns_pictures_upright(fit: Fit, orientation: int, kind: str) -> None:
    upright = picture(150, 60)
    turned = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for step in turned:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[274] = orientation
    crop = Preprocess(48, 48).fitted(fit)(encode(stored, kind, exif=exif))
    assert difference(crop, Preprocess(48, 48).fitted(fit)(encode(upright, kind))) < 3


@pytest.mark.parametrize("size", [(150, 60), (60, 150), (90, 90)])
def test_a_padded_picture_has_the_pretrainings_mean_beside_it_and_is_whole(
    size: tuple[int, int],
) -> None:
    white = Image.new("RGB", size, "white")
    crop = Preprocess(48, 48).fitted("pad")(encode(white, "PNG"))
    is_margin = (crop == (124, 116, 104)).all(axis=2)
    is_picture = (crop == 255).all(axis=2)
    assert (is_margin | is_picture).all()
    narrow = 48 - 2 * round((48 - 48 * min(size) / max(size)) / 2)
    assert is_picture.sum() == 48 * narrow


@pytest.mark.parametrize("fit", FITS)
def test_views_of_each_fit_are_whole_crops(fit: Fit) -> None:
    preprocess = Preprocess(48, 48).fitted(fit)
    data = encode(picture(150, 60), "PNG")
    plain = preprocess(data)
    assert np.array_equal(preprocess(data, view=View()), plain)
    assert np.array_equal(preprocess(data, view=View(mirror=True)), plain[:, ::-1])
    for view in (View(0.08, -0.08, 1.12), View(-0.08, 0.08, 0.85), View(0, 0, 0.85)):
        assert preprocess(data, view=view).shape == (48, 48, 3)
    if fit == "pad":  # shrunk by a view, there is more margin
        margin = (preprocess(data, view=View(scale=1.12)) == (124, 116, 104)).all(axis=2).sum()
        assert margin > (plain == (124, 116, 104)).all(axis=2).sum()


@pytest.mark.parametrize("fit", FITS)
def test_transparency_is_laid_on_white_in_each_fit(fit: Fit) -> None:
    clear = Image.new("RGBA", (120, 40), (255, 0, 0, 0))
    crop = Preprocess(48, 48).fitted(fit)(encode(clear, "PNG"))
    assert (crop[24, 24] == 255).all()


def test_the_share_of_a_side_that_is_cut_off() -> None:
    preprocess = Preprocess(48, 48)
    assert preprocess.share_cut_off(100, 100) == pytest.approx(0.125)
    assert preprocess.share_cut_off(400, 100) == preprocess.share_cut_off(100, 400)
    assert preprocess.share_cut_off(400, 100) == pytest.approx(1 - 0.875 / 4)
    assert preprocess.fitted("whole").share_cut_off(400, 100) == pytest.approx(0.75)
    for fit in ("squash", "pad"):
        assert preprocess.fitted(fit).share_cut_off(400, 100) == 0
