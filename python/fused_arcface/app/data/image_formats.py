"""Formats of images that are decoded, and the sizes that a GIF declares.

Pillow decodes them; see :func:`fused_arcface.app.data.read_image`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

_FORMAT_OF = {
    **dict.fromkeys((".jfif", ".jpe", ".jpeg", ".jpg"), "JPEG"),
    **dict.fromkeys((".pbm", ".pgm", ".pnm", ".ppm"), "PPM"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".bmp": "BMP", ".dib": "DIB", ".gif": "GIF", ".png": "PNG", ".tga": "TGA", ".webp": "WEBP"},
}
# JPEG 2000 is not among them: its decoder takes up to 25 bytes a pixel, and memory for each declared tile.
SUFFIXES = tuple(sorted(_FORMAT_OF))
"""Endings of the names of images, in small letters; other files are left alone."""
FORMATS = tuple(sorted(set(_FORMAT_OF.values())))
"""Pillow's names of these formats. No other decoder sees a file, whatever its content looks like."""


def gif_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the sizes (width, height) that a GIF declares up to its first image; nothing for another kind of file.

    Pillow fills an area of the first image's size while it opens the file, before it tells the size. The layout is
    that of the GIF89a specification, https://www.w3.org/Graphics/GIF/spec-gif89a.txt.
    """
    head = file.read(13)
    if len(head) < 13 or not head.startswith((b"GIF87a", b"GIF89a")):
        return
    width, height = struct.unpack_from("<HH", head, 6)
    yield width, height
    if head[10] & 128:
        file.read(3 << (head[10] & 7) + 1)  # the palette
    while kind := file.read(1):
        if kind == b",":
            place = file.read(8)
            if len(place) == 8:
                left, top, wide, high = struct.unpack("<HHHH", place)
                yield max(width, left + wide), max(height, top + high)
            return
        if kind == b"!":
            file.read(1)
            while length := file.read(1):
                if length == b"\0":
                    break
                file.read(length[0])
