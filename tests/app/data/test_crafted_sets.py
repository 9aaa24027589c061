"""Pickled pairs that somebody made to take time or memory, and one text that several images are."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL")
if sys.platform != "linux":
    pytest.skip("limits and peaks are read from /proc", allow_module_level=True)

from support import fuzzing
from support.image_files import encoded, picture

from fused_arcface.app.data import DataError
from fused_arcface.app.data.formats.pickled_pairs import read_pickled_pairs


def text_of(content: bytes) -> bytes:
    """The instruction for a text."""
    return b"X" + struct.pack("<I", len(content)) + content


_ENCODED = b"c_codecs\nencode\nq\0%sq\1X\6\0\0\0latin1q\2(" + b"h\0h\1h\2\x86R" * 200
CRAFTED_PICKLES = {
    "a text that is encoded again and again": _ENCODED % text_of(b"a" * 1_000_000),
    "a text of wide characters": text_of(b"a" * 30_000_000 + "😀".encode()),
    "a line of wide characters": b"V" + b"a" * 30_000_000 + rb"\U0001f600" + b"\n",
    "many texts": b"(" + text_of(b"ab") * 1_400_000,
    "many numbers": b"(" + b"\x8a\x08" * 1 + b"\xff" * 8 + b"\x8a\x08\1\2\3\4\5\6\7\x08" * 1_400_000,
    "many names": b"(" + b"cnumpy\nndarray\n" * 1_400_000,
    "many arrays": b"(cnumpy.core.multiarray\n_reconstruct\nq\0cnumpy\nndarray\nq\1K\0\x85q\2U\1bq\3"
    + b"h\0h\1h\2h\3\x87R" * 149_000,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name.startswith("many") else ()) for name in CRAFTED_PICKLES]
)
def test_crafted_pickles_take_little_time_and_memory(name: str, tmp_path: Path) -> None:
    kind = fuzzing.Format(name, lambda root: root, read_pickled_pairs, (DataError,), seconds=fuzzing.CRAFTED_SECONDS)
    assert fuzzing.failures(kind, tmp_path / "x.bin", [b"\x80\2" + CRAFTED_PICKLES[name]]) == []


def test_a_text_that_many_images_share_is_read_for_each(tmp_path: Path) -> None:
    images = [encoded(picture(i, 0), "jpeg") for i in range(2)] * 3
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images, [True] * 3), 2))
    found = read_pickled_pairs(tmp_path / "x.bin")
    assert [bytes(image) for image in found.images] == images
