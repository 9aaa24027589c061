"""RecordIO: the bytes on disk, and the data sets in them."""

from __future__ import annotations

import os
import pickle
import random
import re
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.image_files import encoded, picture, write_records

from fused_arcface.app.data import (
    DataError,
    ImageSpec,
    RecordFile,
    RecordWriter,
    formats,
    open_source,
    pack_image,
    unpack_image,
)
from fused_arcface.app.data.formats.record_index import read_index as read_keys_and_offsets
from fused_arcface.app.data.formats.recordio import RecordError
from fused_arcface.app.data.formats.records import RecordImages

SPEC = ImageSpec(16, 1)
MAGIC = b"\x0a\x23\xd7\xce"


def write(path: Path, *payloads: bytes) -> Path:
    with RecordWriter(path) as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, payload)
    return path


def read_index(path: Path) -> dict[int, int]:
    keys, offsets = read_keys_and_offsets(path, 10_000)
    return dict(zip(keys.tolist(), offsets.tolist(), strict=True))


def test_bytes_on_disk(tmp_path: Path) -> None:
    """Written out by hand from the format's description."""
    path = write(tmp_path / "a.rec", b"12345", b"")
    assert path.read_bytes() == MAGIC + b"\x05\0\0\0" + b"12345\0\0\0" + MAGIC + b"\0\0\0\0"
    assert (tmp_path / "a.idx").read_text() == "0\t0\n1\t16\n"
    assert pack_image(3.0, 7, b"jpeg") == struct.pack("<IfQQ", 0, 3.0, 7, 0) + b"jpeg"
    assert pack_image([3.0, 0.5], 7, b"jpeg") == struct.pack("<IfQQff", 2, 0.0, 7, 0, 3.0, 0.5) + b"jpeg"


def test_a_payload_with_the_magic_number_is_stored_in_parts(tmp_path: Path) -> None:
    payload = b"abcd" + MAGIC + b"efgh" + MAGIC + b"ij"
    path = write(tmp_path / "a.rec", payload)
    parts = [(1, b"abcd"), (2, b"efgh"), (3, b"ij")]
    expected = b"".join(MAGIC + struct.pack("<I", kind << 29 | len(part)) + part for kind, part in parts) + b"\0\0"
    assert path.read_bytes() == expected
    assert RecordFile(path).read(0, 0) == payload


def test_any_payload_comes_back(tmp_path: Path) -> None:
    draw = random.Random(0)
    # Words of which many are the magic number, at aligned places and at others.
    payloads = [
        b"".join(draw.choice([MAGIC, b"\0", b"ab", b"abcd"]) for _ in range(draw.randrange(12))) for _ in range(300)
    ]
    path = write(tmp_path / "a.rec", *payloads)
    file = RecordFile(path)
    index = read_index(path.with_suffix(".idx"))
    assert [file.read(index[key], key) for key in range(300)] == payloads
    assert list(file.scan()) == list(index.values())
    again = pickle.loads(pickle.dumps(file))  # as a data-loader worker gets it where processes are spawned
    assert again.read(index[7], 7) == payloads[7]


def test_image_headers() -> None:
    assert unpack_image(pack_image([5], 1, b"x")) == ((5.0,), 1, b"x")
    with pytest.raises(ValueError, match="an image's record must have >= 24 bytes; got 3"):
        unpack_image(b"abc")
    with pytest.raises(ValueError, match="a record with 3 labels must have >= 36 bytes; got 30"):
        unpack_image(struct.pack("<IfQQ", 3, 0, 0, 0) + b"sixsix")


@pytest.mark.parametrize("labels_each", [1, 3])
@pytest.mark.parametrize("index", [True, False])
def test_a_data_set_with_a_header(tmp_path: Path, labels_each: int, index: bool) -> None:
    root = write_records(tmp_path, identities=4, samples=3, labels_each=labels_each)
    if not index:
        (root / "train.idx").unlink()
    found = open_source(str(root))
    assert isinstance(found, RecordImages) and found.problems == []
    assert found.notes == (
        [] if index else [f"{root / 'train.idx'} is missing: train.rec was scanned, its records are numbered from 0"]
    )
    assert found.labels.tolist() == [i for i in range(4) for _ in range(3)] and found.names == ["0", "1", "2", "3"]
    assert len(found) == 12 and found.read(5, SPEC).shape == SPEC.shape
    assert found.spec_of(0) == ImageSpec(32, 1)
    assert torch.equal(open_source(str(root / "train.rec")).read(5, SPEC), found.read(5, SPEC))


def test_a_data_set_without_a_header(tmp_path: Path) -> None:
    image = encoded(picture(0, 0))
    path = write(tmp_path / "a.rec", *(pack_image([label, 9], 0, image) for label in (1, 0, 1)))
    assert RecordImages(path).labels.tolist() == [1, 0, 1]


def test_an_image_with_the_magic_number_in_it(tmp_path: Path) -> None:
    image = encoded(picture(0, 0))
    padding = MAGIC * 2  # after the image's end, where decoders do not look; the header is 24 bytes
    payload = pack_image(2.0, 0, image + b"\0" * (-len(image) % 4) + padding)
    path = write(tmp_path / "a.rec", pack_image(1.0, 0, image), payload)
    found = RecordImages(path)
    assert found.names == ["1", "2"] and torch.equal(found.read(0, SPEC), found.read(1, SPEC))


def test_a_truncated_file(tmp_path: Path) -> None:
    root = write_records(tmp_path, identities=4, samples=3)
    path, offsets = root / "train.rec", read_index(root / "train.idx")
    path.write_bytes(path.read_bytes()[: offsets[11] + 100])
    end = path.stat().st_size
    cut = f"{path}: record 11 at byte {offsets[11]} cannot be read: it must end at byte "
    for index in (True, False):
        if not index:
            (root / "train.idx").unlink()
        found = RecordImages(path)
        assert found.labels.tolist() == [i for i in range(4) for _ in range(3)][:10]
        problem = next(each for each in found.problems if "record 11" in each)
        assert problem.startswith(cut) and problem.endswith(f"the file ends at byte {end}")
        if index:
            assert any(
                f"record 12 at byte {offsets[12]} cannot be read: the file ends" in each for each in found.problems
            )


def test_the_rest_of_a_truncated_file_is_counted(tmp_path: Path) -> None:
    """With an index each of its records is known, and would have the same to say."""
    root = write_records(tmp_path, identities=4, samples=30)
    path, offsets = root / "train.rec", read_index(root / "train.idx")
    path.write_bytes(path.read_bytes()[: offsets[11] + 100])
    found = RecordImages(path)
    assert len(found) == 10
    assert [problem.partition(" cannot be read")[0] for problem in found.problems[:4]] == [
        f"{path}: record {number} at byte {offsets[number]}" for number in range(11, 15)
    ]
    assert found.problems[4:] == [f"{path}: 106 more records cannot be read for the same reason"]


def test_bad_records_are_named_and_left_out(tmp_path: Path) -> None:
    image = encoded(picture(0, 0))
    path = write(
        tmp_path / "a.rec",
        *(pack_image(float(label), 0, image) for label in (0, 1, 2, 3)),
        b"short",
        pack_image(0.5, 0, image),
    )
    offsets = read_index(path.with_suffix(".idx"))
    data = bytearray(path.read_bytes())
    data[offsets[2] : offsets[2] + 4] = b"\xff" * 4
    path.write_bytes(data)
    for index in (True, False):
        if not index:
            path.with_suffix(".idx").unlink()
        found = RecordImages(path)
        assert found.names == ["0", "1", "3"]
        assert found.problems == [
            f"{path}: record 2 at byte {offsets[2]} cannot be read: 0xced7230a is missing; got 0xffffffff",
            f"{path}: record 4 at byte {offsets[4]}: an image's record must have >= 24 bytes; got 5",
            f"{path}: record 5 at byte {offsets[5]}: its label must be a whole number >= 0; got 0.5",
            f"{path}: record 3 at byte {offsets[3]} is the first with label 3: none has label 2",
        ]


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", b"abcd" + MAGIC + b"ef", b"next")
    offset = read_index(path.with_suffix(".idx"))[1]
    data = bytearray(path.read_bytes())
    data[12 + 7] = 0  # the last part says that it is a whole record
    path.write_bytes(data)
    with pytest.raises(RecordError, match="record 0 at byte 0 cannot be read: its last part is missing"):
        RecordFile(path).read(0, 0)
    found = list(RecordFile(path).scan())
    assert isinstance(found[0], RecordError) and found[1:] == [12, offset]


def test_an_unreadable_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", pack_image(0.0, 0, encoded(picture(0, 0))), pack_image(1.0, 0, b"no image"))
    offset = read_index(path.with_suffix(".idx"))[1]
    with pytest.raises(ValueError, match=rf"a\.rec: record 1 at byte {offset}: an image of 8 bytes cannot be read"):
        RecordImages(path).read(1, SPEC)


def test_files_that_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_bytes(b"something else entirely")
    with pytest.raises(DataError, match=r"a\.rec has no record of an image.*record 0 at byte 0 cannot be read"):
        RecordImages(tmp_path / "a.rec")
    (tmp_path / "a.idx").write_text("0\t0\nwhat\n")
    with pytest.raises(DataError, match=r"a\.idx: line 2 must be a key and an offset; got 'what'"):
        RecordImages(tmp_path / "a.rec")
    with pytest.raises(DataError, match=r"missing\.rec does not exist$"):
        RecordImages(tmp_path / "missing.rec")
    with pytest.raises(DataError, match=re.escape(f"nothing does not exist; data must be {formats.listed()}")):
        open_source(str(tmp_path / "nothing"))


def rewrite_index(root: Path, change: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]) -> None:
    lines = [(int(key), int(offset)) for key, offset in map(str.split, (root / "train.idx").read_text().splitlines())]
    (root / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in change(lines)))


def test_repeated_keys_are_counted(tmp_path: Path) -> None:
    image = encoded(picture(0, 0))
    path = write(tmp_path / "train.rec", *(pack_image(float(i % 6), 0, image) for i in range(24)))
    rewrite_index(tmp_path, lambda lines: [(key % 6, offset) for key, offset in lines])
    found = RecordImages(path)
    assert len(found) == 6 and found.problems == [
        f"{tmp_path / 'train.idx'}: 18 records are not used: another line has the same key, as key 0"
    ]
    rewrite_index(tmp_path, lambda lines: [(line, offset) for line, (_, offset) in enumerate(lines + lines[:2])])
    found = RecordImages(path)
    assert len(found) == 24 and found.problems == [
        f"{tmp_path / 'train.idx'}: 2 keys are not used: their record has another key as well"
    ]


def test_records_that_im2rec_could_not_write(tmp_path: Path) -> None:
    """It gives them the offset 2⁶⁴ - 1."""
    root = write_records(tmp_path, identities=4, samples=3)
    rewrite_index(root, lambda lines: [(key, 2**64 - 1 if key in (3, 5) else offset) for key, offset in lines])
    found = RecordImages(root / "train.rec")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert found.problems[0] == (f"{root / 'train.idx'}: 2 records are not used: it has no offset for them, as key 3")
    assert any("the header says 12 images, the index has 10" in each for each in found.problems)


def test_an_index_shorter_than_its_records(tmp_path: Path) -> None:
    image = encoded(picture(0, 0))
    path = write(tmp_path / "train.rec", *(pack_image(float(i % 2), 0, image) for i in range(24)))
    offsets = list(read_index(tmp_path / "train.idx").values())
    rewrite_index(tmp_path, lambda lines: lines[4:8] + lines[12:20])
    found = RecordImages(path)
    assert len(found) == 12 and found.problems == [
        f"{path}: 12 records are not used: train.idx does not name them; the first is at byte {offsets[0]}"
    ]


def test_images_behind_the_headers_end_are_counted(tmp_path: Path) -> None:
    image = encoded(picture(0, 0))
    labels = [pack_image(float(i), 0, image) for i in range(4)]
    path = write(tmp_path / "a.rec", pack_image([3, 4], 0, b""), *labels, pack_image([1, 2], 0, b""))
    found = RecordImages(path)
    assert found.names == ["0", "1"]
    assert found.problems == [
        f"{path}: record 0 at byte 0: 2 images are not used: the header says that images end before 3"
    ]


@pytest.mark.parametrize("end", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_header_that_says_nothing(end: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", pack_image([end, 4], 0, b""), pack_image(0.0, 0, encoded(picture(0, 0))))
    found = RecordImages(path)
    assert len(found) == 1 and "the header must say where the images end; got" in found.problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0\n1 2 3\n", "line 2 must be a key and an offset; got '1 2 3'"),
        ("0\t0\n\n", "line 2 must be a key and an offset; got ''"),
        ("0\t" + "9" * 10**6, "line 1 must be a key and an offset; got '0"),
        ("0\t-1\n", "line 1 must be a key"),
        (f"0\t0\n{2**63}\t4\n", r"line 2 must have a key below 2\^63"),
        ("0\t0\n" * 1000, r"names more records than its \.rec file has room for"),
    ],
)
def test_an_index_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", pack_image(0.0, 0, encoded(picture(0, 0))))
    path.with_suffix(".idx").write_text(text)
    with pytest.raises(DataError, match=message):
        RecordImages(path)


def head(part: int, length: int) -> bytes:
    return MAGIC + struct.pack("<I", part << 29 | length)


CRAFTED = {
    # Each took minutes: a block of the file was read for each broken head, a whole payload for each record.
    "heads that point beyond the end": (head(0, 2**29 - 1) * 300_000, None),
    "parts without an end": (head(1, 0) * 300_000, None),
    "magic numbers": (MAGIC * 600_000, None),
    "parts that lead into one another": (
        b"".join(head(1, 8 * (20_000 - i)) for i in range(20_000)) + head(2, 0) * 20_000 + head(3, 0),
        range(20_000),
    ),
    "a record of many labels": (head(0, 2_000_024) + struct.pack("<IfQQ", 500_000, 0, 0, 0) + bytes(2_000_000), None),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files_take_no_longer_than_others(name: str, tmp_path: Path) -> None:
    content, rows = CRAFTED[name]
    (tmp_path / "a.rec").write_bytes(content)
    if rows is not None:
        (tmp_path / "a.idx").write_text("".join(f"{row}\t{8 * row}\n" for row in rows))
    started = time.process_time()
    with pytest.raises(DataError, match=r"a\.rec"):
        RecordImages(tmp_path / "a.rec").read(0, SPEC)
    assert time.process_time() - started < 20  # a reader without the limit takes minutes


def test_pipes_do_not_hang(tmp_path: Path) -> None:
    path = write(tmp_path / "a.rec", pack_image(0.0, 0, encoded(picture(0, 0))))
    path.with_suffix(".idx").unlink()
    os.mkfifo(path.with_suffix(".idx"))
    with pytest.raises(DataError, match=r"a\.idx must be a regular file; it is a named pipe"):
        RecordImages(path)
    with pytest.raises(DataError, match=r"a\.idx must be a regular file; it is a named pipe"):
        RecordFile(path.with_suffix(".idx"))


def test_a_record_of_endless_parts_is_broken(tmp_path):
    """A million parts of 8 bytes took seconds, and ten times their size in memory."""
    whole = _record(0, struct.pack("<IfQQ", 0, 0, 0, 0) + b"jpeg")
    (tmp_path / "a.rec").write_bytes(_record(1) + _record(2) * 2000 + _record(3) + whole)
    found = RecordImages(tmp_path / "a.rec")
    assert len(found) == 1 and "it has more than 1000 parts" in found.problems[0]
    (tmp_path / "a.idx").write_text(f"1\t0\n2\t{8 * 2002}\n")
    found = RecordImages(tmp_path / "a.rec")
    assert len(found) == 1 and "it has more than 1000 parts" in found.problems[0]


def test_many_missing_labels_are_told_in_a_few_lines(tmp_path):
    """Each of 50,000 gaps took a search through all records: minutes."""
    images = (struct.pack("<IfQQ", 0, 3 * label, 0, 0) + b"jpeg" for label in range(50_000))
    (tmp_path / "a.rec").write_bytes(b"".join(map(partial(_record, 0), images)))
    found = RecordImages(tmp_path / "a.rec")
    assert found.names[-1] == "149997" and len(found.problems) == 21
    assert found.problems[0].endswith("is the first with label 3: none has label 1 to 2")
    assert found.problems[-1].endswith("labels are missing at 49979 more places")


def _record(part: int, payload: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<I", part << 29 | len(payload)) + payload + bytes(-len(payload) % 4)
