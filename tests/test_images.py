"""Images of any size and mode to what a net takes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, picture
from PIL import Image

from fused_arcface.data import ImageError, ImageSpec, read_image
from fused_arcface.data.images import image_spec

GREY, COLOUR = ImageSpec(8, 1), ImageSpec(8, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "PA", "HSV"])
@pytest.mark.parametrize("spec", [GREY, COLOUR])
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
    found = read_image(encoded(picture(0, 0, "RGB", size)), COLOUR)
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


@pytest.mark.parametrize("how", ["RGBA", "palette", "grey"])
def test_transparent_parts_lie_on_white(how: str) -> None:
    if how == "RGBA":
        data = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    elif how == "grey":
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
    with pytest.raises(ImageError, match=r"text\.jpg cannot be read as an image: no format that Pillow knows"):
        read_image(tmp_path / "text.jpg", GREY)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png cannot be read"):
        read_image(tmp_path / "empty.png", GREY)
    whole = encoded(picture(0, 0, size=(64, 64)))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.png cannot be decoded as an image"):
        read_image(tmp_path / "cut.png", GREY)
    with pytest.raises(ImageError, match="an image of 5 bytes cannot be read"):
        read_image(b"bytes", GREY)
    with pytest.raises(ImageError, match=r"missing\.png cannot be read"):
        read_image(tmp_path / "missing.png", GREY)


def test_a_spec_is_told_from_a_file() -> None:
    assert image_spec(encoded(picture(0, 0, "L", (30, 20)))) == ImageSpec(20, 1)
    assert image_spec(encoded(picture(0, 0, "RGB", (30, 40)))) == ImageSpec(30, 3)
    with pytest.raises(ValueError, match="channels must be 1 or 3; got 2"):
        ImageSpec(8, 2)
    with pytest.raises(ValueError, match="size must be >= 1; got 0"):
        ImageSpec(0, 1)
