"""Formats of images that are decoded, and the sizes that a GIF or a WebP declares.

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


def declared_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the sizes (width, height) that a GIF or a WebP declares; nothing for another kind of file.

    Pillow takes memory for an area of this size while it opens such a file, before it tells the size.
    """
    start = file.read(30)
    file.seek(0)
    if start.startswith((b"GIF87a", b"GIF89a")):
        yield from _gif_sizes(file)
    elif len(start) == 30 and start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        yield from _webp_size(start)


def _webp_size(start: bytes) -> Iterator[tuple[int, int]]:
    """Yield the size in the first chunk, whose kind decides on the layout.

    The layouts are in https://developers.google.com/speed/webp/docs/riff_container (``VP8X``), in its specification of
    the lossless format (``VP8L``), and in RFC 6386, section 9.1 (``VP8``).
    """
    kind = start[12:16]
    if kind == b"VP8X":
        yield int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", start, 21)
        yield (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", start, 26)
        yield width & 0x3FFF, height & 0x3FFF  # the other two bits scale the picture on a screen


def _gif_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the size of the screen and that of the first image.

    The layout is that of the GIF89a specification, https://www.w3.org/Graphics/GIF/spec-gif89a.txt.
    """
    head = file.read(13)
    if len(head) < 13:
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
