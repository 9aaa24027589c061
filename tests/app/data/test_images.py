"""Images of any size and mode to what a net takes."""

from __future__ import annotations

import contextlib
import io
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import encoded, picture

from fused_arcface.app.data import DataError, ImageError, ImageSpec, read_image
from fused_arcface.app.data.image_formats import declared_sizes
from fused_arcface.app.data.images import image_spec

GRAY, COLOR = ImageSpec(8, 1), ImageSpec(8, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "PA", "HSV"])
@pytest.mark.parametrize("spec", [GRAY, COLOR])
def test_every_mode_gives_the_same_picture(mode: str, spec: ImageSpec, tmp_path: Path) -> None:
    half = np.zeros((20, 20), dtype=np.uint8)
    half[:, 10:] = 255  # black on the left, white on the right
    plain = Image.fromarray(half)
    if mode == "I;16":
        image = Image.fromarray(half.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(half.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(half.astype(np.float32) / 255)
    else:
        image = plain.convert("RGB").convert(mode) if mode != "PA" else plain.convert("PA")
    assert image.mode == mode
    suffix = "tif" if mode in ("F", "CMYK", "YCbCr", "I", "PA") else "png"
    if mode in ("PA", "HSV"):  # which no file format holds: through memory
        image = image.convert("RGBA")
    image.save(tmp_path / f"image.{suffix}")
    found = read_image(tmp_path / f"image.{suffix}", spec)
    assert found.shape == spec.shape and found.dtype == torch.float32 and found.is_contiguous()
    assert found[:, :, :3].sub(-1).abs().max() < 0.02 and found[:, :, -3:].sub(1).abs().max() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 9), (300, 200)])
def test_every_size(size: tuple[int, int]) -> None:
    found = read_image(encoded(picture(0, 0, "RGB", size)), COLOR)
    assert found.shape == (3, 8, 8) and found.isfinite().all() and found.min() >= -1 and found.max() <= 1


def test_the_middle_square_is_taken() -> None:
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    assert read_image(encoded(wide), ImageSpec(10, 1)).eq(1).all()


def test_depth_is_kept() -> None:
    steps = np.arange(256 * 4, dtype=np.uint16).reshape(32, 32) * 64  # more levels than 8 bits have
    found = read_image(encoded(Image.fromarray(steps)), ImageSpec(32, 1))
    assert len(found.unique()) == 1024 and torch.allclose(
        found.flatten(), torch.from_numpy(steps / 32767.5 - 1).float().flatten(), atol=1e-6
    )


@pytest.mark.parametrize("how", ["RGBA", "palette", "gray"])
def test_transparent_parts_lie_on_white(how: str) -> None:
    if how == "RGBA":
        data = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    elif how == "gray":
        data = encoded(Image.new("LA", (4, 4), (0, 0)))
    else:
        file = io.BytesIO()
        Image.new("P", (4, 4), 0).save(file, "png", transparency=0)
        data = file.getvalue()
    assert read_image(data, ImageSpec(4, 3)).eq(1).all()


def test_exif_turns_the_picture() -> None:
    image = Image.new("L", (20, 20), 0)
    image.paste(255, (0, 0, 20, 10))  # white above
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    image.save(file, "png", exif=exif)
    found = read_image(file.getvalue(), ImageSpec(20, 1))
    assert found[0, 0].eq(-1).all() and found[0, -1].eq(1).all()


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"text\.jpg cannot be read as an image: none of BMP, DIB, GIF, JPEG,"):
        read_image(tmp_path / "text.jpg", GRAY)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png cannot be read"):
        read_image(tmp_path / "empty.png", GRAY)
    whole = encoded(picture(0, 0, size=(64, 64)))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.png cannot be decoded as an image"):
        read_image(tmp_path / "cut.png", GRAY)
    with pytest.raises(ImageError, match="an image of 5 bytes cannot be read"):
        read_image(b"bytes", GRAY)
    with pytest.raises(ImageError, match=r"missing\.png does not exist"):
        read_image(tmp_path / "missing.png", GRAY)


def test_a_spec_is_told_from_a_file() -> None:
    assert image_spec(encoded(picture(0, 0, "L", (30, 20)))) == ImageSpec(20, 1)
    assert image_spec(encoded(picture(0, 0, "RGB", (30, 40)))) == ImageSpec(30, 3)
    with pytest.raises(ValueError, match="channels must be 1 or 3; got 2"):
        ImageSpec(8, 2)
    with pytest.raises(ValueError, match="size must be >= 1; got 0"):
        ImageSpec(0, 1)


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(eps(), id="eps"),
        pytest.param(encoded(picture(0, 0, "RGB"), "dds"), id="dds"),
        pytest.param(encoded(picture(0, 0), "ico"), id="ico"),
        pytest.param(encoded(picture(0, 0), "pcx"), id="pcx"),
        pytest.param(encoded(picture(0, 0), "jpeg2000"), id="jpeg2000"),
        pytest.param(b"\0\0\0\x1cftypavif" + bytes(64), id="avif"),
    ],
)
def test_formats_that_no_suffix_names_are_not_decoded(content: bytes, tmp_path: Path, monkeypatch) -> None:
    """A file is decoded by its content, so a name that looks like an image's must not start any other decoder."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"photo\.jpg cannot be read as an image: none of BMP, DIB, GIF"):
        read_image(tmp_path / "photo.jpg", GRAY)
    with pytest.raises(DataError, match=r"photo\.jpg cannot be read"):
        image_spec(tmp_path / "photo.jpg")


@pytest.mark.parametrize("format", ["bmp", "dib", "gif", "jpeg", "png", "ppm", "tga", "tiff", "webp"])
def test_each_accepted_format_under_any_accepted_suffix(format: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), "white")
    for suffix in (".png", ".jpg"):
        (tmp_path / f"image{suffix}").write_bytes(encoded(image, format))
        assert read_image(tmp_path / f"image{suffix}", COLOR).eq(1).all()


def png_of(width: int, height: int, rows: int) -> bytes:
    """A gray PNG of zeros that says it has ``height`` rows and holds ``rows`` of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes((width + 1) * rows))) + chunk(b"IEND", b"")


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    bomb = png_of(13_000, 13_000, rows=1)
    limit = rf"must have at most max_pixels={2**25} pixels; got 13000 × 13000"
    for read in (lambda: read_image(bomb, GRAY), lambda: image_spec(bomb)):
        with pytest.raises(ImageError, match=limit):
            read()
    with pytest.raises(ImageError, match=r"could be decompression bomb"):  # Pillow's own limit
        read_image(png_of(200_000, 1000, rows=1), GRAY)
    with pytest.raises(ImageError, match="at most max_pixels=400 pixels; got 20 × 21"):
        read_image(png_of(20, 21, rows=21), GRAY, max_pixels=400)


def gif_of(screen: tuple[int, int], image: tuple[int, int], palette: int = 0, disposal: int = 2) -> bytes:
    """A GIF of a screen and a first image of these sizes, without pixels; what it shows is to be disposed of."""
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 128 | palette if palette else 0, 0, 0)
    head += bytes(3 << palette + 1) if palette else b""
    comment, control = b"!\xfe\x03abc\0", b"!\xf9\x04" + bytes([disposal << 2]) + b"\0\0\0\0"
    return head + comment + control + b"," + struct.pack("<HHHHB", 0, 0, *image, 0) + b"\x02\x02\x4c\x01\0;"


@pytest.mark.parametrize("palette", [0, 7])
@pytest.mark.parametrize("sizes", [((13_000, 13_000), (1, 1)), ((1, 1), (13_000, 13_000))], ids=["screen", "image"])
def test_a_gifs_sizes_are_checked_before_pillow_takes_memory(sizes, palette: int, monkeypatch) -> None:
    gif = gif_of(*sizes, palette)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("Pillow has opened it"))
    for read in (lambda: read_image(gif, GRAY), lambda: image_spec(gif)):
        with pytest.raises(ImageError, match=rf"at most max_pixels={2**25} pixels; got 13000 × 13000"):
            read()


def test_a_gif_of_an_allowed_size_is_read() -> None:
    assert read_image(encoded(picture(0, 0), "gif"), GRAY).shape == GRAY.shape
    whole = encoded(Image.new("P", (20, 21)), "gif")
    with pytest.raises(ImageError, match="at most max_pixels=400 pixels; got 20 × 21"):
        read_image(whole, GRAY, max_pixels=400)
    for length in range(len(whole)):  # cut anywhere
        with contextlib.suppress(ImageError):
            read_image(whole[:length], GRAY)


def webp_of(kind: bytes, layout: bytes) -> bytes:
    """The first 30 bytes of a WebP whose first chunk is of this kind, and has its size in this layout."""
    return b"RIFF" + struct.pack("<I", 1000) + b"WEBP" + kind + struct.pack("<I", 900) + layout


@pytest.mark.parametrize(
    "webp",
    [
        webp_of(b"VP8X", bytes(4) + (12_999).to_bytes(3, "little") * 2),
        webp_of(b"VP8L", b"\x2f" + struct.pack("<I", 12_999 | 12_999 << 14) + bytes(5)),
        webp_of(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 13_000, 13_000 | 1 << 14)),
    ],
    ids=["extended", "lossless", "lossy"],
)
def test_a_webps_size_is_checked_before_pillow_takes_memory(webp: bytes, monkeypatch) -> None:
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("Pillow has opened it"))
    for read in (lambda: read_image(webp, GRAY), lambda: image_spec(webp)):
        with pytest.raises(ImageError, match=rf"at most max_pixels={2**25} pixels; got 13000 × 13000"):
            read()


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=str)
def test_the_size_of_a_webp_is_pillows(options: dict[str, Any]) -> None:
    for size in ((1, 1), (20, 21), (300, 7), (1, 16_383)):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "webp", **options)
        file.seek(0)
        assert list(declared_sizes(file)) == [size]


@pytest.mark.filterwarnings("error")
def test_an_image_that_is_refused_says_so_once(tmp_path: Path) -> None:
    """Between its limit and twice that Pillow warns on stderr, about a size that is an error here."""
    (tmp_path / "large.png").write_bytes(png_of(10_000, 13_000, rows=1))
    with pytest.raises(ImageError, match="got 10000 × 13000"):
        read_image(tmp_path / "large.png", GRAY)


def test_the_pixel_limit_can_be_raised_beyond_pillows(monkeypatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)  # from 100 on it refuses
    assert read_image(png_of(20, 20, rows=20), GRAY, max_pixels=400).eq(-1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_a_bad_image(value: float, tmp_path: Path) -> None:
    pixels = np.full((20, 20), 0.5, dtype=np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float\.tif cannot be decoded as an image: its pixels must be finite"):
        read_image(tmp_path / "float.tif", GRAY)


def test_every_error_of_a_decoder_is_a_bad_image(monkeypatch) -> None:
    class Odd(Exception):
        pass

    for error in (Odd("odd"), MemoryError(), RecursionError("deep"), NotImplementedError("DXT9"), KeyError(7)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        with pytest.raises(ImageError, match=r"cannot be decoded as an image: ."):
            read_image(encoded(picture(0, 0)), GRAY)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF and TIFF tags
@pytest.mark.parametrize("format", ["bmp", "gif", "jpeg", "png", "ppm", "tga", "tiff", "webp"])
def test_changed_bytes_give_an_image_or_a_bad_image(format: str) -> None:
    whole, draw = bytearray(encoded(picture(0, 0, "RGB", (24, 20)), format)), random.Random(format)
    for _ in range(60):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randint(1, 8)):
            if data:
                data[draw.randrange(min(len(data), 200))] = draw.randrange(256)
        try:
            found = read_image(bytes(data), COLOR, max_pixels=1_000_000)
        except ImageError:
            continue
        assert found.shape == (3, 8, 8) and found.isfinite().all()
