"""Files that were made to do harm, or are of another kind: one error with the file's name, and never a traceback."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from support.net_files import load_weights

from fused_arcface.app import cli
from fused_arcface.app.data import DataError, ImageSpec, read_image
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.data.formats.pickled_pairs import read_pickled_pairs
from fused_arcface.app.data.formats.records import RecordImages
from fused_arcface.app.data.pair_sets import read_pair_set
from fused_arcface.app.nets.small import SmallNet
from fused_arcface.base.reading import check_regular, file_errors, open_regular, read_bytes
from fused_arcface.checkpoint import convert, safetensors


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, kind in {
        "pipe": "a named pipe",
        "link": "a named pipe",
        ".": "a folder",
        "/dev/zero": "a device",
    }.items():
        for function in (check_regular, open_regular):
            with pytest.raises(DataError, match=f"must be a regular file; it is {kind}"):
                function(tmp_path / name)
    for name in ("nothing", "x" * 300, "a\0b"):
        with pytest.raises(DataError, match=r"cannot be read: |nothing does not exist$"):
            open_regular(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12345")
    assert check_regular(tmp_path / "file") == 5 and read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(DataError, match="file must have <= 4 bytes; it has more"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.png", lambda path: read_image(path, ImageSpec(8, 1))),
        ("x.rec", RecordImages),
        ("x.bin", read_pickled_pairs),
        ("x.npz", EmbeddingSet.load),
        ("x.safetensors", EmbeddingSet.load),
        ("x.safetensors", convert.read),
        ("x.pt", convert.read),
        ("x.txt", lambda path: read_pair_set(str(path))),
        ("x.pth", lambda path: load_weights(SmallNet(8), path)),
    ],
)
def test_git_lfs_pointers_are_named(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 132\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer, not the file itself; .*: git lfs pull$"):
        read(tmp_path / name)


def test_every_decoders_error_is_a_data_error() -> None:
    for error in (KeyError("x"), RecursionError("deep"), MemoryError(), OverflowError("large"), struct.error("short")):
        with pytest.raises(DataError, match=r"^a\.x cannot be read: \S+"), file_errors("a.x"):
            raise error
    with pytest.raises(KeyboardInterrupt), file_errors("a.x"):
        raise KeyboardInterrupt


def write_safetensors(path: Path, header: Any, content: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "negative offset": {"weight": entry(-24, 0, [2, 3])},
    "overlap": {"weight": entry(0, 24, [2, 3]), "other": entry(12, 24, [1, 3])},
    "gap": {"weight": entry(0, 12, [1, 3]), "other": entry(16, 24, [2])},
    "beyond the end": {"weight": entry(0, 48, [4, 3])},
    "shape of another size": {"weight": entry(0, 24, [2, 30])},
    "negative shape": {"weight": entry(0, 24, [-2, -3])},
    "10^12 rows": {"weight": entry(0, 24, [10**12, 3])},
    "overflow": {"weight": entry(0, 24, [2**62, 4])},
    "text for a shape": {"weight": entry(0, 24, "23")},  # type: ignore[arg-type]
    "no object": [1, 2],
    "deep": b'{"a":' * 100_000,
    "length of 2^63": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if HOSTILE[name] is None:
        path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    else:
        write_safetensors(path, HOSTILE[name])
    for read in (safetensors.read, convert.read, EmbeddingSet.load):
        with pytest.raises(DataError, match=r"x\.safetensors is not a safetensors file, or it is truncated: \S"):
            read(path)


@pytest.mark.parametrize(
    ("tensors", "kept", "message"),
    [
        ({"weight": entry(0, 24, [6])}, {}, r"weight must be numbers \(C, D\); it is \(6,\)"),
        ({"weight": entry(0, 24, [1, 2, 3])}, {}, r"weight must be numbers \(C, D\); it is \(1, 2, 3\)"),
        ({"weight": entry(0, 24, [3], "I64")}, {}, r"weight must be numbers \(C, D\)"),
        (
            {"weight": entry(0, 16, [2, 2]), "x": entry(16, 24, [2, 1])},
            {"seed": "../../x"},
            "seed must be a whole number",
        ),
        (
            {"weight": entry(0, 16, [2, 2]), "x": entry(16, 24, [1, 2])},
            {},
            r"x must have 2 rows, as weight; it is \(1, 2\)",
        ),
        ({"weight": entry(0, 24, [2, 3])}, {"step": "../../x"}, "step must be a whole number >= 0"),
        ({"weight": entry(0, 24, [2, 3])}, {"step": -1}, "step must be a whole number >= 0"),
        ({"weight": entry(0, 24, [2, 3])}, {"seed": 2**63}, "seed must be a whole number >= 0"),
        ({"weight": entry(0, 24, [2, 3])}, {"optimizer": {"lr": [1]}}, "optimizer must be an object of numbers"),
        ({"weight": entry(0, 24, [2, 3])}, ["seed"], "must be an object; it is a list"),
    ],
)
def test_centers_that_fit_the_format_and_nothing_else(
    tensors: dict[str, Any], kept: Any, message: str, tmp_path: Path
) -> None:
    header = {"__metadata__": {"fused_arcface": json.dumps(kept)}, **tensors}
    path = write_safetensors(tmp_path / "x.safetensors", header)
    with pytest.raises(convert.ConvertError, match=message):
        convert.read(path)
    assert cli.run(["convert", str(path), str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("paths", ["[" * 100_000, "[" * 500 + "]" * 500, "[1]", '{"a": 1}'])
def test_names_that_are_none(paths: str, tmp_path: Path) -> None:
    header = {"__metadata__": {"paths": paths}, "embeddings": entry(0, 24, [2, 3])}
    with pytest.raises(DataError, match=r"x\.safetensors(: paths must be a list of texts| cannot be read)"):
        EmbeddingSet.load(write_safetensors(tmp_path / "x.safetensors", header))


def npy(descr: str, shape: tuple[int, ...], content: bytes = b"") -> bytes:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("<f4", (10**12, 512)), r"must have the bytes of \(1000000000000, 512\) float32; it has 0"),
        (npy("<f4", (-2, -3), bytes(24)), "cannot be read|must have the bytes"),
        (npy("|O", (1,), bytes(8)), "must not have elements of type object"),
        (npy("<c8", (1, 1), bytes(8)), "must not have elements of type complex64"),
        (npy("<U4", (1,), bytes(16)), "must not have elements of type <U4"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "cannot be read"),
        (b"no array", "cannot be read"),
        (npy("<f4", (2,), bytes(8)), r"must hold floating-point embeddings \(M, D\)"),
        (npy("<f4", (1, 2), struct.pack("<ff", float("nan"), 1)), "embeddings must be finite"),
        (npy("<f4", (10**15, 0)), r"must hold embeddings \(M <= 1048\d\d\d, D >= 1\)"),
        (npy("<f2", (2 << 20, 1), bytes(4 << 20)), r"must hold embeddings \(M <= 1049\d\d\d, D >= 1\)"),
        (npy("|u1", (70 << 20, 1), bytes(70 << 20)), "embeddings must have fewer bytes for a file of this size"),
    ],
)
def test_hostile_npz(content: bytes, message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embeddings.npy", content)
    with pytest.raises(DataError, match=rf"x\.npz.*({message})"):
        EmbeddingSet.load(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("embeddings.npy", npy("<f4", (1, 1), bytes(4)))
    with pytest.raises(DataError, match=r"embeddings\.npy must be stored or deflated"):
        EmbeddingSet.load(tmp_path / "y.npz")


@pytest.mark.parametrize(("descr", "count"), [("<U0", 10**9), ("|S0", 10**9), ("|S1", 60_000_000)])
def test_names_that_take_no_room_in_a_file(descr: str, count: int, tmp_path: Path) -> None:
    """As texts they would take gigabytes: names for other rows than there are are not made."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("embeddings.npy", npy("<f4", (2, 2), bytes(16)))
        archive.writestr("paths.npy", npy(descr, (count,), bytes(count if descr == "|S1" else 0)))
    if descr == "|S1":
        assert EmbeddingSet.load(tmp_path / "x.npz").paths == ["x.npz[0]", "x.npz[1]"]
    else:
        with pytest.raises(DataError, match=r"paths\.npy must not have elements of type"):
            EmbeddingSet.load(tmp_path / "x.npz")


def test_npz_of_other_programs(tmp_path: Path) -> None:
    """Other byte orders, Fortran's order, compressed, unsigned and boolean arrays."""
    embeddings = np.asfortranarray(np.arange(12, dtype=">f8").reshape(4, 3))
    np.savez_compressed(
        tmp_path / "e.npz",
        embeddings=embeddings,
        labels=np.array([0, 0, 1, 1], ">u2"),
        pairs=np.array([[0, 1], [1, 2]], np.uint64),
        same=np.array([True, False]),
        paths=np.array(["a", "b", "c", "d"]),
        more=np.array([None]),
    )
    found = EmbeddingSet.load(tmp_path / "e.npz")
    assert found.embeddings.tolist() == embeddings.tolist() and found.embeddings.dtype == torch.float32
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 1] and found.paths == ["a", "b", "c", "d"]
    assert found.pairs is not None and found.pairs.same.tolist() == [True, False]


@pytest.mark.parametrize("state", [{"a": "text"}, {1: torch.zeros(1)}, [1, 2], "text", {"weight": {"x": 1}}, {}])
def test_weights_that_are_none(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt (has no weights of (this|a) net|cannot be read as a file of tensors)"):
        load_weights(SmallNet(8, 1), tmp_path / "x.pt")


def test_a_flipped_bit_in_a_net_is_noticed(tmp_path: Path) -> None:
    net = SmallNet(8, 1)
    path = tmp_path / "model.pt"
    torch.save(net.state_dict(), path)
    whole, draw = path.read_bytes(), random.Random(3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    errors = 0
    for _ in range(60):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            load_weights(net, path)
        except DataError as error:
            errors += str(path) in str(error)
        assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert errors > 40  # the others are in what zip keeps twice, or fills up
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    load_weights(net, path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, 4).to_sparse_csr(),
        torch.zeros(4, 4, device="meta"),
    ],
    ids=["sparse", "compressed rows", "without values"],
)
def test_tensors_that_are_not_dense(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"weight": tensor}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt(: weight must be a dense tensor; it is| cannot be read as a file of)"):
        convert.convert([tmp_path / "x.pt"], tmp_path / "y.safetensors")
    torch.save({**SmallNet(8, 1).state_dict(), "weight": tensor}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt(: weight must be a dense tensor; it is| cannot be read as a file of)"):
        load_weights(SmallNet(8, 1), tmp_path / "x.pt")


def test_tensors_that_only_their_shape_makes_large(tmp_path: Path) -> None:
    for state in ({"weight": torch.zeros(1, 4).expand(10**9, 4)}, {"W": torch.zeros(4, 1).expand(4, 10**9)}):
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(DataError, match=r"x\.pt: W|weight is \(.*1000000000.*\), of which the file has 16 bytes"):
            convert.read(tmp_path / "x.pt")


def test_a_compressed_file_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    for read in (convert.read, lambda path: load_weights(SmallNet(8, 1), path)):
        with pytest.raises(DataError, match=r"x\.pt must have its tensors uncompressed"):
            read(tmp_path / "x.pt")
    assert convert.read(tmp_path / "plain.pt").num_classes == 1000


@pytest.mark.parametrize(
    "text",
    [
        "epochs = " + "9" * 400,
        "lr = " + "9" * 400,
        "epochs = 1" + "0" * 5000,
        "lr = 1e400",
        "lr = nan",
        "data = " + "[" * 20_000,
        "data = " + "{a=" * 5000,
        ".".join("a" * 20_000) + " = 1",
        "data = 1979-05-27T07:32:00Z",
        "[data]\nx = 1",
        'data = "\\ud800"',
        "\x00",
        "a" * 70_000,
    ],
    ids=lambda text: text[:12].replace("\0", "NUL"),
)
def test_options_that_are_none(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text(text)
    assert cli.run(["train", "--output", str(tmp_path / "run"), "--config", str(tmp_path / "x.toml")]) == 2
    assert str(tmp_path / "x.toml") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["JPG", "Jpeg", "PNG", "tiff"])
def test_lfw_pairs_find_images_of_any_suffix(suffix: str, tmp_path: Path) -> None:
    for name in ("Ann", "Bob"):
        (tmp_path / name).mkdir()
        for number in (1, 2):
            (tmp_path / name / f"{name}_{number:04d}.{suffix}").touch()
    (tmp_path / "Ann" / "Ann_0001.txt").touch()
    (tmp_path / "pairs.txt").write_text("Ann 1 2\nAnn 1 Bob 2\n")
    found = read_pair_set(str(tmp_path / "pairs.txt"))
    assert [Path(path).name for path in found.paths] == [f"{n}.{suffix}" for n in ("Ann_0001", "Ann_0002", "Bob_0002")]


def test_pairs_whose_names_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text(f"{'x' * 5000} a 1\na\0b c 0\n{'../' * 2000}x 1 2\n")
    with pytest.raises(DataError, match=r"has no pairs whose images are there: .*line 1: "):
        read_pair_set(str(tmp_path / "pairs.txt"))


def test_a_safetensors_file_with_a_long_text_is_a_short_error(tmp_path):
    header = b'{"weight": "' + b"A" * 100_000 + b'"}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DataError, match="is not a safetensors file") as raised:
        safetensors.read(path)
    assert len(str(raised.value)) < 1000
