"""One function opens every image: pixels decide, metadata never does, and nobody else parses bytes.

GRAFT_IMAGE_MUTATIONS=20000 make test ARGS="tests/models/test_images.py -k mutated"   # usual: 400
"""

from __future__ import annotations

import ast
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.duplicates import Signature, compute_signature
from models import images
from models.errors import GraftError
from models.images import (
    MAX_PIXELS,
    ImageError,
    ImageTooLargeError,
    OpenedImage,
    begins_as,
    is_wide,
    open_image,
    read_max_pixels,
)
from models.preprocess import Preprocess
from service.engine.wire import JobImage
from service.engine.worker import Worker
from service.settings import Settings

PREPROCESS = Preprocess(height=32, width=32, crop_fraction=1.0)
NUM_MUTATIONS = int(os.environ.get("GRAFT_IMAGE_MUTATIONS", "400"))
LIMIT = 1_000_000
ROOMS = Path(__file__).resolve().parents[2]
XMP = '<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}/>'


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth, and different in each orientation."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 255 * np.exp(-8 * (x**2 + y**2))], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def grey(width: int = 60, height: int = 40) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.asarray(picture(width, height).convert("L")).astype(np.uint16)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "AVIF":
        options = {"quality": 100, "subsampling": "4:4:4", "speed": 10, **options}
    if kind == "WEBP" and "quality" not in options:
        options["lossless"] = True
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes, *, is_whole: bool = True) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body)) if is_whole else b"\x00\x00\x00\x01"
    return struct.pack(">I", len(body)) + kind + body + checksum


def in_png(extra: bytes, where: bytes = b"IDAT") -> bytes:
    data = encode(picture(), "PNG")
    place = data.index(where) - 4
    return data[:place] + extra + data[place:]


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def in_jpeg(extra: bytes, **options: Any) -> bytes:
    data = encode(picture(), "JPEG", **options)
    return data[:2] + extra + data[2:]


def in_webp(kind: bytes, body: bytes) -> bytes:
    data = encode(picture(), "WEBP", xmp=b"placeholder")
    place = data.index(b"XMP ")
    return data[:place] + kind + struct.pack("<I", len(body)) + body


BIG = zlib.compress(b"x" * 3_000_000)
BROKEN_EXIF = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
ORIENTED_XMP = XMP.format('tiff:Orientation="6"').encode()


@pytest.mark.parametrize(
    "data",
    [
        in_png(chunk(b"zTXt", b"workflow\x00\x00" + BIG)),
        in_png(chunk(b"zTXt", b"workflow\x00\x00" + BIG), where=b"IEND"),
        in_png(chunk(b"iTXt", b"prompt\x00\x01\x00\x00\x00" + BIG)),
        in_png(chunk(b"iCCP", b"icc\x00\x00" + BIG)),
        in_png(chunk(b"iCCP", b"icc\x00\x07nonsense")),
        in_png(chunk(b"iCCP", b"")),
        in_png(chunk(b"tEXt", b"a\x00b", is_whole=False)),
        in_png(chunk(b"tRNS", b"\x00\x01\x02\x03\x04\x05", is_whole=False)),
        in_png(chunk(b"tRNS", b"\x00")),
        in_png(chunk(b"pHYs", b"\x00")),
        in_png(chunk(b"gAMA", b"\x00")),
        in_png(chunk(b"sRGB", b"")),
        in_png(chunk(b"cHRM", b"\x01")),
        in_png(chunk(b"acTL", b"\x01")),
        in_png(chunk(b"eXIf", b"not a TIFF header")),
        in_png(chunk(b"eXIf", BROKEN_EXIF[6:])),
        in_png(chunk(b"tEXt", b"Raw profile type exif\x00\nexif\n8\nnot hexadecimal")),
        encode(picture(), "PNG")[:-12],
        in_webp(b"EXIF", b"not a TIFF header!"),
        in_webp(b"EXIF", BROKEN_EXIF),
        in_webp(b"XMP ", b"<tiff:Orientation>"),
        encode(picture(), "TIFF", tiffinfo={34665: 4_000_000_000, 34853: 3, 282: 0}),
        encode(picture(), "TIFF", tiffinfo={700: b"tiff:Orientation"}),
    ],
)
def test_broken_or_large_metadata_does_not_cost_the_picture(data: bytes) -> None:
    opened = open_image(data)
    assert np.array_equal(np.asarray(opened.pixels), np.asarray(picture()))
    assert (opened.width, opened.height, opened.orientation) == (60, 40, 1)


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xED, b"Photoshop 3.0\x00" + b"8BIM\x07\xdb"),
        segment(0xEE, b"Adobe"),
        b"\xff\x01",
        segment(0xE1, BROKEN_EXIF),
        segment(0xE2, b"MPF\x00MM\x00*\xff\xff\xff\xff"),
        segment(0xE2, b"ICC_PROFILE\x00"),
        segment(0xE0, b"JFIF\x00"),
        segment(0xFE, b""),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00<broken"),
        segment(0xEB, b"\x00" * 60_000),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_that_libjpeg_decodes_is_read_with_its_orientation(extra: bytes, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encode(picture().convert(mode), "JPEG")
    data = encode(picture().convert(mode), "JPEG", exif=exif)
    data = data[:2] + extra + data[2:]
    opened = open_image(data)
    assert (opened.width, opened.height, opened.format) == (60, 40, "JPEG")
    assert opened.orientation == (1 if BROKEN_EXIF in extra else 6)
    assert np.array_equal(np.asarray(opened.pixels), np.asarray(open_image(plain).pixels))
    found = compute_signature(data)
    assert isinstance(found, Signature)
    assert found.shorter_side == 40


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_whole_jpeg_without_its_end_marker_is_read(mode: str, progressive: bool) -> None:
    data = encode(picture().convert(mode), "JPEG", progressive=progressive)
    whole, without_end = open_image(data), open_image(data[:-2])
    assert np.array_equal(np.asarray(whole.pixels), np.asarray(without_end.pixels))
    for missing in (3, 12, 60):
        with pytest.raises(ImageError):
            open_image(data[:-missing])


def with_exif(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(), kind, exif=exif)


def with_xmp(kind: str, orientation: int, form: str) -> bytes:
    xmp = XMP.format(form.format(orientation)).encode()
    if kind == "JPEG":
        return in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00" + xmp))
    if kind == "PNG":
        return in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + xmp))
    if kind in ("TIFF", "BigTIFF"):
        return encode(picture(), "TIFF", tiffinfo={700: xmp}, big_tiff=kind == "BigTIFF")
    return encode(picture(), kind, xmp=xmp)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_exif_and_xmp_orient_every_format_alike(kind: str, orientation: int) -> None:
    by_exif = PREPROCESS(with_exif(kind, orientation))
    turned = picture().transpose(images.UPRIGHT[orientation])
    assert np.abs(by_exif.astype(int) - PREPROCESS(encode(turned, "PNG"))).mean() < 2
    for form in ('tiff:Orientation="{}"', "tiff:Orientation = '{}'", "><tiff:Orientation>{}</x"):
        by_xmp = PREPROCESS(with_xmp(kind, orientation, form))
        assert np.abs(by_exif.astype(int) - by_xmp).mean() < 1, form


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_xmp_orients_big_tiff_as_tiff(orientation: int) -> None:
    small, big = (
        PREPROCESS(with_xmp(kind, orientation, 'tiff:Orientation="{}"'))
        for kind in ("TIFF", "BigTIFF")
    )
    assert np.array_equal(small, big)


def test_exif_comes_before_xmp() -> None:
    extra = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00" + ORIENTED_XMP)
    exif = Image.Exif()
    exif[0x0112] = 3
    assert open_image(in_jpeg(extra, exif=exif)).orientation == 3
    exif[0x0112] = 9
    assert open_image(in_jpeg(extra, exif=exif)).orientation == 6


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encode(picture(), "PPM"), "PPM"),
        (encode(picture().convert("L"), "PPM"), "PPM"),
        (encode(picture().convert("1"), "PPM"), "PPM"),
        (b"P2\n# a comment\n2 2\n255\n0 255\n128 64\n", "PPM"),
        (b"P3 1 1 255 10 20 30 ", "PPM"),
        (b"P5 2 1 4095\n\x0f\xff\x00\x00", "PPM"),
        (encode(picture(), "AVIF"), "AVIF"),
        (encode(picture(), "GIF"), "GIF"),
        (encode(picture(), "BMP"), "BMP"),
        (encode(picture(), "TIFF", big_tiff=True), "TIFF"),
        (encode(picture(), "JPEG"), "JPEG"),
    ],
)
def test_the_format_is_found_by_content(data: bytes, kind: str) -> None:
    assert begins_as(data[: images.NUM_MAGIC_BYTES]) == kind
    opened = open_image(data)
    assert opened.format == kind
    assert opened.pixels.mode == "RGB"


def test_a_maximum_of_a_pgm_is_white() -> None:
    assert np.asarray(open_image(b"P5 2 1 4095\n\x0f\xff\x00\x00").pixels)[0, :, 0].tolist() == [
        255,
        0,
    ]


HEIC = b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf" + b"\x00" * 100


def test_heic_needs_pillow_heif_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    images._register_heic.cache_clear()
    with pytest.raises(ImageError, match="HEIC image, which needs the package pillow-heif"):
        open_image(HEIC)


def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    images._register_heic.cache_clear()
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(buffer, quality=-1)
    opened = open_image(buffer.getvalue())
    assert (opened.format, opened.width, opened.height) == ("HEIC", 60, 40)
    assert np.abs(np.asarray(opened.pixels).astype(int) - np.asarray(picture())).mean() < 4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s9--4d.jpg\n", "git annex get"),
        (b"\x00" * 40_000, "placeholder of OneDrive"),
        (b"bplist00\xd4", "placeholder of iCloud"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip; unpack it first"),
        (HEIC[:40] + b"\x01", "HEIC|cut short or damaged|decoded"),
        (b"%PDF-1.7", "readable are JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF"),
        (b"<html>", "it starts with b'<html>'"),
        (b"<html>", r"it is a web page \(HTML\), not an image .*; download the image file itself"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE HTML><html>", "it is a web page"),
        (b"P6 ", "^it cannot be decoded: Reached EOF"),
        (b"P5 1 1 0 ", "PPM|decoded"),
        (encode(picture(), "PNG")[:20], "cannot be decoded: Truncated File"),
    ],
)
def test_what_stands_in_place_of_an_image_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        open_image(data)
    assert "\n" not in str(caught.value)


def wide_png(values: np.ndarray[Any, Any], transparent: int | None = None) -> bytes:
    data = encode(Image.fromarray(values.astype(np.uint16)), "PNG")
    if transparent is None:
        return data
    place = data.index(b"IDAT") - 4
    return data[:place] + chunk(b"tRNS", struct.pack(">H", transparent)) + data[place:]


@pytest.mark.parametrize("transparent", [0, 255, 256, 1000, 30_000, 65_535])
def test_sixteen_bit_grey_is_white_where_it_is_transparent(transparent: int) -> None:
    values = np.full((20, 20), 12_800)
    values[:10] = transparent
    pixels = np.asarray(open_image(wide_png(values, transparent)).pixels)
    assert pixels[:10].min() == 255
    assert pixels[10:].max() == 50


@pytest.mark.parametrize("highest", [255, 1023, 4095, 16_383, 65_535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_stretch_spreads_the_values_of_sixteen_bits(highest: int, kind: str) -> None:
    values = np.rint(grey() * (highest / grey().max())).astype(np.uint16)
    data = encode(Image.fromarray(values), kind)
    opened, stretched = open_image(data), open_image(data, stretch=True)
    assert opened.values == (int(values.min()), highest)
    assert np.asarray(opened.pixels).max() == highest >> 8
    assert np.asarray(stretched.pixels).max() == 255
    assert np.asarray(stretched.pixels).min() == 0


def wide_ppm(kind: str, highest: int, brightest: int) -> bytes:
    """Of two pixels, black and (brightest, half of it, 0)."""
    values = [0, 0, 0, brightest, brightest // 2, 0]
    if kind == "P3":
        return f"P3 2 1 {highest}\n{' '.join(map(str, values))}\n".encode()
    return f"P6 2 1 {highest}\n".encode() + struct.pack(">6H", *values)


@pytest.mark.parametrize("kind", ["P3", "P6"])
@pytest.mark.parametrize("highest", [1023, 65535])
def test_stretch_spreads_the_values_of_a_wide_ppm(kind: str, highest: int) -> None:
    data = wide_ppm(kind, highest, highest // 4)
    opened, stretched = open_image(data), open_image(data, stretch=True)
    assert opened.values == (0, 64 * 257)
    assert np.asarray(opened.pixels)[0].tolist() == [[0, 0, 0], [64, 32, 0]]
    assert np.asarray(stretched.pixels)[0].tolist() == [[0, 0, 0], [255, 128, 0]]


def wide_tiff(num_channels: int, is_big: bool) -> bytes:
    """16 bits a channel, one pixel."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (262, 3, 1, 2 if num_channels == 3 else 1)]
    head, count, offset = (b"II+\0\x08\0\0\0", "<Q", "Q") if is_big else (b"II*\0", "<H", "I")
    width = struct.calcsize("<" + offset)
    bits_end = 500 if 2 * num_channels > width else struct.unpack("<Q", b"\x10\0" * 4)[0]
    tags += [(258, 3, num_channels, bits_end & (1 << 8 * width) - 1), (273, 4, 1, 600)]
    tags += [(277, 3, 1, num_channels), (278, 3, 1, 1), (279, 4, 1, 2 * num_channels)]
    entries = b"".join(struct.pack("<HH" + 2 * offset, *tag) for tag in sorted(tags))
    start = len(head) + width
    folder = struct.pack("<" + offset, start) + struct.pack(count, len(tags)) + entries
    folder += bytes(width)
    data = (head + folder).ljust(500, b"\0") + struct.pack("<3H", 16, 16, 16)
    return data.ljust(600, b"\0") + struct.pack("<3H", 40_000, 20_000, 10_000)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (wide_ppm("P3", 65535, 9), True),
        (wide_ppm("P6", 1023, 9), True),
        (b"P6 1 1 255\n\1\2\3", False),
        (b"P5 1 1 300\n\0\1", True),
        *((wide_tiff(num, is_big), True) for num in (1, 3) for is_big in (True, False)),
        (encode(picture(), "TIFF", big_tiff=True), False),
        (encode(picture(), "TIFF"), False),
    ],
)
def test_wide_images_are_known_by_their_header(data: bytes, expected: bool) -> None:
    assert is_wide(data) is expected
    assert (open_image(data).values is not None) is expected


@pytest.mark.parametrize("end", range(16))
def test_the_header_of_a_big_tiff_may_be_cut_anywhere(end: int) -> None:
    data = wide_tiff(3, True)
    assert is_wide(data[:end]) is False
    with pytest.raises(ImageError):
        open_image(data[:end])


def test_stretch_leaves_eight_bits_alone_and_the_record_as_it_was() -> None:
    data = encode(picture(), "PNG")
    assert open_image(data).values is None
    assert np.array_equal(np.asarray(open_image(data, stretch=True).pixels), np.asarray(picture()))
    assert "stretch" not in Preprocess().to_dict()
    assert Preprocess.from_dict(Preprocess(stretch=True).to_dict()).stretch


def test_one_limit_for_training_and_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_MAX_PIXELS", raising=False)
    assert read_max_pixels() == MAX_PIXELS == Settings().max_pixels
    monkeypatch.setenv("GRAFT_MAX_PIXELS", "2399")
    assert read_max_pixels() == 2399 == Settings().max_pixels
    for kind in images.FORMATS:
        with pytest.raises(ImageTooLargeError, match=r"60x40 .* or set GRAFT_MAX_PIXELS"):
            PREPROCESS(encode(picture(), kind))
    monkeypatch.setenv("GRAFT_MAX_PIXELS", "2400")
    PREPROCESS(encode(picture(), "PNG"))
    for value in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("GRAFT_MAX_PIXELS", value)
        with pytest.raises(GraftError, match=r"GRAFT_MAX_PIXELS=.*whole number"):
            read_max_pixels()


def test_nobody_else_parses_an_image() -> None:
    for room in ("models", "finetune", "service"):
        for path in (ROOMS / room).rglob("*.py"):
            if path == ROOMS / "models" / "images.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    called = f"{getattr(node.value, 'id', '')}.{node.attr}"
                    assert called != "Image.open", path
                    assert node.attr != "getexif", path
                if isinstance(node, ast.Import):
                    assert all(alias.name != "simplejpeg" for alias in node.names), path


def wide_grey() -> Image.Image:
    return Image.fromarray(grey() * 257)


def valid_files() -> dict[str, list[bytes]]:
    """Some of each of ten formats."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    image, animation = picture(), {"save_all": True, "append_images": [picture().rotate(9)]}
    files = {
        "JPEG": [
            encode(image, "JPEG", exif=exif, xmp=ORIENTED_XMP),
            encode(image, "JPEG", progressive=True),
            encode(image.convert("CMYK"), "JPEG", exif=exif),
        ],
        "PNG": [
            encode(image, "PNG", exif=exif),
            encode(image.quantize(40), "PNG", transparency=1),
            encode(wide_grey(), "PNG"),
        ],
        "APNG": [encode(image, "PNG", **animation)],
        "WEBP": [
            encode(image, "WEBP", quality=70, exif=exif, xmp=ORIENTED_XMP),
            encode(image.convert("RGBA"), "WEBP", **animation),
        ],
        "GIF": [encode(image, "GIF", **animation)],
        "BMP": [encode(image, "BMP"), encode(image.quantize(16), "BMP")],
        "TIFF": [
            encode(image, "TIFF", exif=exif),
            encode(image, "TIFF", compression="tiff_lzw"),
            encode(image, "TIFF", compression="jpeg"),
            encode(wide_grey(), "TIFF", **animation),
        ],
        "PPM": [encode(image, "PPM"), b"P3 2 1 255 1 2 3 4 5 6 "],
        "PGM": [encode(image.convert("L"), "PPM"), b"P5 2 1 4095\n\x0f\xff\x00\x00"],
        "AVIF": [encode(image, "AVIF", exif=exif, quality=60)],
    }
    return {name: [data for data in found if data] for name, found in files.items()}


VALID = valid_files()


def change_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 9))):
        changed[int(generator.integers(len(changed)))] = int(generator.integers(256))
    return bytes(changed)


def change_header(data: bytes, generator: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 5))):
        changed[int(generator.integers(min(200, len(changed))))] = int(generator.integers(256))
    return bytes(changed)


def cut_out(data: bytes, generator: np.random.Generator) -> bytes:
    start, end = sorted(generator.integers(0, len(data), 2).tolist())
    return data[:start] + data[end:]


def cut_short(data: bytes, generator: np.random.Generator) -> bytes:
    return data[: int(generator.integers(len(data)))]


def repeat_part(data: bytes, generator: np.random.Generator) -> bytes:
    start, end = sorted(generator.integers(0, min(len(data), 2_000), 2).tolist())
    return data[:end] + data[start:]


MUTATIONS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    change_bytes,
    change_header,
    cut_out,
    cut_short,
    repeat_part,
)


def served_crop(worker: Worker, data: bytes) -> Any:
    return worker._decode(JobImage(True, data)).crop


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", VALID)
def test_mutated_images_have_equal_pixels_in_training_and_service(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    engine: Any = SimpleNamespace(info=SimpleNamespace(batch_size=1))
    worker = Worker(engine, PREPROCESS, LIMIT, [])
    generator = np.random.default_rng(list(VALID).index(kind))
    num_read = 0
    for number in range(-(-NUM_MUTATIONS // len(VALID))):
        valid = VALID[kind][number % len(VALID[kind])]
        data = MUTATIONS[number % len(MUTATIONS)](valid, generator)
        served = served_crop(worker, data)
        if isinstance(served, ImageError):
            with pytest.raises(ImageError) as caught:
                PREPROCESS(data, max_pixels=LIMIT)
            assert str(caught.value) == str(served)
            continue
        opened = PREPROCESS.open(data, max_pixels=LIMIT)
        crop = PREPROCESS.crop(opened)
        num_read += 1
        assert isinstance(opened, OpenedImage)
        assert crop.shape == (32, 32, 3)
        assert np.array_equal(crop, served), (kind, number)
        signature = compute_signature(data)
        assert signature is not None
        assert signature.shorter_side == min(opened.width, opened.height)
    assert num_read > 0
    capfd.readouterr()  # libtiff writes about damaged files to stderr


# Transparency.


def transparent_images(width: int, height: int) -> dict[str, Image.Image]:
    rgba = picture(width, height).convert("RGBA")
    rgba.putalpha(picture(width, height).convert("L").rotate(180))
    palette = rgba.convert("RGB").quantize(16)
    palette.info["transparency"] = bytes([0, 90, 255, 7])
    found = {"RGBA": rgba, "LA": rgba.convert("LA"), "RGBa": rgba.convert("RGBa"), "P": palette}
    for mode, key in (("RGB", rgba.convert("RGB").getpixel((3, 3))), ("L", 100)):
        found[mode] = rgba.convert("RGB").convert(mode)
        found[mode].info["transparency"] = key
    return found


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "P", "RGB", "L"])
@pytest.mark.parametrize("size", [(60, 40), (7, 64), (5, 65), (30, 300)])
def test_strips_over_white_are_the_pixels_of_the_whole(mode: str, size: tuple[int, int]) -> None:
    image = transparent_images(*size)[mode]
    rgba = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", size, "white"), rgba).convert("RGB")
    found = images._narrow_to_rgb(image)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(whole))


MEASURE = """
import sys
from models.images import open_image
def read_peak_bytes():
    lines = open("/proc/self/status")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
data = sys.stdin.buffer.read()
before = read_peak_bytes()
open_image(data)
print(read_peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["RGBA", "P", "TIFF"])
def test_a_transparent_image_takes_twice_its_pixels_at_most(kind: str) -> None:
    """At 9,400 x 9,400: 434 MB (P) to 695 MB; with whole copies 1.5 to 1.8 GB."""
    size, options = (3000, 3000), dict[str, Any]()
    image = Image.new("RGBA", size, (10, 20, 30, 99))
    if kind == "P":
        image = Image.new("P", size, 3)
        image.putpalette(list(range(256)) * 3)
        options["transparency"] = bytes([0, 128, 255, 7])
    if kind == "TIFF":
        options["compression"] = "tiff_lzw"
    data = encode(image, "TIFF" if kind == "TIFF" else "PNG", **options)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=data,
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOMS)},
    )
    # Pillow keeps 4 bytes a pixel; 16 MB are for its strips and libraries.
    assert int(run.stdout) < 2 * 4 * size[0] * size[1] + 16e6


@pytest.mark.parametrize(
    ("limit", "size", "message"),
    [
        (1000, (60, 40), "60x40 is 2,400 pixels, the limit is 1,000;"),
        (2399, (60, 40), "60x40 is 2,400 pixels, the limit is 2,399;"),
        (1_000_000, (1001, 1000), "1001x1000 is 1,001,000 pixels, the limit is 1,000,000;"),
        (1_000_000, (2000, 1000), "2000x1000 is 2.0 megapixels, the limit is 1.0;"),
    ],
)
def test_a_limit_and_what_is_over_it_differ_in_the_message(
    limit: int, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ImageTooLargeError, match=message):
        open_image(encode(Image.new("L", size), "PNG"), max_pixels=limit)
