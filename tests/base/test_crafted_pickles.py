"""Pickles made to end a reader: keys too deep for Python's hash, bytes of any number, one text used again and again."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("limits and peaks are read from /proc", allow_module_level=True)

from support import fuzzing

from fused_arcface.app.data import DataError
from fused_arcface.app.data.formats.pickled_pairs import read_pickled_pairs
from fused_arcface.base import pickles, torch_files
from fused_arcface.checkpoint import version1

DEEP = b")" + b"\x85" * 200_000  # a tuple within a tuple, and so on
CASES = {
    "key": b"\x80\x02}" + DEEP + b"Ns.",
    "key of a called dict": b"\x80\x02ccollections\nOrderedDict\n)R" + DEEP + b"Ns.",
    "reference": b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n" + DEEP + b"X\x03\0\0\0cpuK\x02tQ.",
    "set": b"\x80\x04\x8f(" + DEEP + b"\x90.",
    "frozenset": b"\x80\x04(" + DEEP + b"\x91.",
    "set by a call": b"\x80\x02cbuiltins\nset\n](" + DEEP + b"e\x85R.",
    "Counter": b"\x80\x02ccollections\nCounter\n](" + DEEP + b"e\x85R.",
    "pairs": b"\x80\x02ccollections\nOrderedDict\n](" + DEEP + b"K\x01\x86e\x85R.",
    "lists of two": b"\x80\x02ccollections\nOrderedDict\n](](" + DEEP + b"K\x01ee\x85R.",
    "attributes": b"\x80\x02ccollections\nOrderedDict\n)R](](" + DEEP + b"K\x01eeb.",
    "layout": b"\x80\x02ctorch.serialization\n_get_layout\n" + DEEP + b"\x85R.",
    "many bytes": b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x10\x85R.",  # a quarter of a GiB from 30 bytes
}


def archive(content: bytes) -> bytes:
    """A file as torch.save writes it, with another pickle."""
    plain, changed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2, 2)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(changed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else source.read(entry))
    return changed.getvalue()


@pytest.mark.slow
def test_deep_keys_end_no_process(tmp_path):
    def unpickle(path: Path) -> None:
        with path.open("rb") as file:
            pickles.read_pickle(file, path.stat().st_size, version1.ADMITTED)

    errors, seconds = (pickles.Refused, pickles.Damaged), fuzzing.CRAFTED_SECONDS
    of_format_1 = fuzzing.Format("format 1", lambda root: root, unpickle, errors, seconds=seconds)
    named = [CASES[name] for name in ("key", "set", "frozenset")]
    assert fuzzing.failures(of_format_1, tmp_path / "a", named) == []
    errors = (torch_files.TensorFileError,)
    of_torch = fuzzing.Format("pt", lambda root: root, torch_files.load, errors, seconds=seconds)
    assert fuzzing.failures(of_torch, tmp_path / "a.pt", map(archive, CASES.values())) == []


def test_plain_keys_are_read(tmp_path):
    content = {("a", (1, 2)): torch.ones(2), 3: {"x": (1, (2, (3,)))}, None: [1.5, True, bytearray(b"ab\xff")]}
    for new in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        found = torch_files.load(tmp_path / "a.pt")
        assert found.keys() == content.keys() and found["a", (1, 2)].sum() == 2
        assert found[3] == content[3] and found[None] == content[None]


@pytest.mark.slow
def test_a_text_is_checked_once_however_often_it_is_used(tmp_path):
    """90,000 images are one text of a megabyte: to look at it for each took minutes."""
    text, uses = b"a" * (1 << 20), b"h\x00h\x01h\x02\x86R" * 90_000
    content = (
        b"\x80\x02(c_codecs\nencode\nq\x00X" + struct.pack("<I", len(text)) + text + b"q\x01X\x06\0\0\0latin1q\x02"
    )
    seconds = fuzzing.CRAFTED_SECONDS
    kind = fuzzing.Format("bin", lambda root: root, read_pickled_pairs, (DataError,), seconds=seconds)
    assert fuzzing.failures(kind, tmp_path / "a.bin", [content + uses + b"l]\x86."]) == []


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.complex128])
def test_a_tensor_has_no_more_bytes_than_the_file(tmp_path, kind):
    """Otherwise an older torch reads past the bytes of the file."""
    torch.save(torch.ones(200, dtype=kind), tmp_path / "a.pt")
    assert torch_files.load(tmp_path / "a.pt").sum() == 200
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"K\xc8", b"K\xc9")
            target.writestr(entry.filename, content)
    size = kind.itemsize
    rule = f"a tensor must have {201 * size} bytes; the file has {200 * size}"
    with pytest.raises(torch_files.TensorFileError, match=rule):
        torch_files.load(tmp_path / "b.pt")
